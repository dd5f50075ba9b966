// A cluster of blocks holds a row of logits in shared memory: it is read once from memory and then as often as need be.
// Where every token may be drawn it is not kept: once is enough.
//
// top_k: the k-th largest by its bits, 11 at a time, from histograms. top_p: a token is in the nucleus if the mass
// above it is less than top_p. The draw, an argmax over all tokens, is taken if it is in the nucleus; otherwise nothing
// below it is either, and the draw is made again from what is above. That is the argmax over the nucleus, without a
// sort. Sums are in a fixed order, so that a row's draw does not depend on its batch.
#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/mma.cuh"
#include "common/nvtx.h"
#include "common/vec.cuh"
#include "kernels/sample.h"

namespace cs336 {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 384, kWarps = kThreads / 32, kBins = kThreads * kSampleCluster;
constexpr int kAhead = 2;  // vectors of logits that a thread loads before it uses them
constexpr float kLog2E = 1.4426950408889634f, kMax = 3.402823466e38f;

struct Stats {  // of the logits as they came in: maximum and sum of exp(logit - maximum); then of what is drawn from
  float raw_top, raw_sum, top;
  int token;
};
struct Candidate {
  float score, distance;  // below the largest logit
  int token, unused;
};
struct Mass {
  float mass, unused[3];
};

__device__ __forceinline__ bool ahead(float a, int a_token, float b, int b_token) {
  return a > b || (a == b && a_token < b_token);
}

__device__ __forceinline__ Stats merge(const Stats& a, const Stats& b) {
  Stats c{fmaxf(a.raw_top, b.raw_top), 0.f, a.top, a.token};
  if (c.raw_top > -INFINITY)
    c.raw_sum = a.raw_sum * expf(a.raw_top - c.raw_top) + b.raw_sum * expf(b.raw_top - c.raw_top);
  if (ahead(b.top, b.token, a.top, a.token)) c.top = b.top, c.token = b.token;
  return c;
}
__device__ __forceinline__ Candidate merge(const Candidate& a, const Candidate& b) {
  return ahead(b.score, b.token, a.score, a.token) ? b : a;
}
__device__ __forceinline__ Mass merge(const Mass& a, const Mass& b) { return {a.mass + b.mass}; }

struct Shared {
  int histogram[kBins];
  uint4 of_warps[kWarps];
  uint4 of_blocks[2][kSampleCluster];
  int sums[kWarps], totals[kSampleCluster];
  int bin, left;
};

// What all threads of a row merge into, in an order of its own.
class Row {
 public:
  __device__ explicit Row(Shared& shared) : shared_(shared) { cluster_.barrier_arrive(); }

  // Before the first that is merged: a block that has not begun has no shared memory yet that others could write to.
  __device__ __forceinline__ void await_blocks() { cluster_.barrier_wait(); }

  template <typename R>
  __device__ R merged(R mine) {
    static_assert(sizeof(R) == sizeof(uint4));
    uint4& words = reinterpret_cast<uint4&>(mine);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      uint4 other = {__shfl_down_sync(~0u, words.x, offset), __shfl_down_sync(~0u, words.y, offset),
                     __shfl_down_sync(~0u, words.z, offset), __shfl_down_sync(~0u, words.w, offset)};
      mine = merge(mine, reinterpret_cast<R&>(other));
    }
    if (threadIdx.x % 32 == 0) shared_.of_warps[threadIdx.x / 32] = words;
    __syncthreads();
    R all = in_order<R>(shared_.of_warps, kWarps);
    uint4* slots = shared_.of_blocks[turn_];
    if (threadIdx.x < kSampleCluster)
      cluster_.map_shared_rank(slots, threadIdx.x)[cluster_.block_rank()] = reinterpret_cast<uint4&>(all);
    turn_ ^= 1;
    cluster_.sync();
    return in_order<R>(slots, kSampleCluster);
  }

  // The bits of the distance of the k-th nearest to the top, k >= 1, of n values in shared memory a block.
  __device__ uint32_t kth(const float* values, int n, float top, int k) {
    uint32_t found = 0;
    int high = 31;  // distances are not negative: 31 bits
    while (high > 0) {
      const int bits = high < 11 ? high : 11, low = high - bits;
      for (int i = threadIdx.x; i < kBins; i += kThreads) shared_.histogram[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < n; i += kThreads) {
        const uint32_t key = __float_as_uint(top - values[i]);
        if (high == 31 || key >> high == found) atomicAdd(&shared_.histogram[key >> low & ((1 << bits) - 1)], 1);
      }
      cluster_.sync();
      k = find(k);
      found = found << bits | shared_.bin;
      high = low;
    }
    return found;
  }

 private:
  template <typename R>
  static __device__ R in_order(const uint4* parts, int count) {
    uint4 first = parts[0];
    R all = reinterpret_cast<R&>(first);
    for (int i = 1; i < count; i++) {
      uint4 next = parts[i];
      all = merge(all, reinterpret_cast<R&>(next));
    }
    return all;
  }

  // Puts the bin in which the k-th is into `bin` of every block; returns which it is in there. Each block adds up an
  // eighth of the bins of all blocks.
  __device__ int find(int k) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = cluster_.block_rank();
    const int bin = rank * kThreads + threadIdx.x;
    int mine = 0;
#pragma unroll
    for (int r = 0; r < kSampleCluster; r++) mine += cluster_.map_shared_rank(shared_.histogram, r)[bin];
    int before = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(~0u, before, offset);
      if (lane >= offset) before += other;
    }
    if (lane == 31) shared_.sums[warp] = before;
    before -= mine;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kWarps; w++) {
      if (w < warp) before += shared_.sums[w];
      all += shared_.sums[w];
    }
    if (threadIdx.x < kSampleCluster) cluster_.map_shared_rank(shared_.totals, threadIdx.x)[rank] = all;
    cluster_.sync();
    for (int r = 0; r < rank; r++) before += shared_.totals[r];
    if (before < k && k <= before + mine) {
      for (int r = 0; r < kSampleCluster; r++) {
        *cluster_.map_shared_rank(&shared_.bin, r) = bin;
        *cluster_.map_shared_rank(&shared_.left, r) = k - before;
      }
    }
    cluster_.sync();
    return shared_.left;
  }

  Shared& shared_;
  cg::cluster_group cluster_ = cg::this_cluster();
  int turn_ = 0;
};

// ---- what is drawn from ----

template <typename T>
__device__ __forceinline__ float finite(T x) {  // NaN becomes -inf, so that it is never drawn
  const float value = to_float(x);
  return value == value ? fminf(value, kMax) : -INFINITY;
}

struct Settings {
  float temperature, top_p, min_p, repetition, presence, frequency;
  int top_k;
  bool counted;

  __device__ Settings(const SampleParams& p, int row)
      : temperature(p.temperature[row]),
        top_p(p.top_p[row]),
        min_p(p.min_p[row]),
        repetition(p.repetition ? p.repetition[row] : 1.f),
        presence(p.presence ? p.presence[row] : 0.f),
        frequency(p.frequency ? p.frequency[row] : 0.f),
        top_k(p.top_k[row]),
        counted(p.counts && (repetition != 1.f || presence != 0.f || frequency != 0.f)) {}

  // Whether every token may be drawn, by its logit as it came in.
  __device__ __forceinline__ bool takes_any(const SampleParams& p) const {
    const bool cut = (top_k > 0 && top_k < p.vocabulary) || top_p < 1.f || min_p > 0.f;
    return temperature > 0.f && !cut && !counted && !p.bias;
  }

  __device__ __forceinline__ float penalised(float x, int count) const {
    if (count > 0) x = x > 0.f ? x / repetition : x * repetition;
    const int generated = count & (kInPrompt - 1);
    x -= frequency * generated;
    return generated > 0 ? x - presence : x;
  }
};

// 16 bytes of logits as they lie in memory, loaded at once where they are whole and aligned.
template <typename T>
struct Logits {
  static constexpr int kSize = 16 / sizeof(T);
  uint4 words;
  bool whole;

  __device__ __forceinline__ void load(const T* row, int first, int n, bool aligned) {
    whole = aligned && first + kSize <= n;
    if (whole) words = __ldcs(reinterpret_cast<const uint4*>(row + first));
  }
  __device__ __forceinline__ void unpack(const T* row, int first, int n, float (&x)[kSize]) const {
    const T* values = reinterpret_cast<const T*>(&words);
#pragma unroll
    for (int i = 0; i < kSize; i++)
      x[i] = whole ? finite(values[i]) : first + i < n ? finite(row[first + i]) : -INFINITY;
  }
};

template <int kSize>
__device__ __forceinline__ float largest(const float (&x)[kSize]) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < kSize; i++) top = fmaxf(top, x[i]);
  return top;
}

// Loads this block's part of the row, from `begin` on, into shared memory.
template <typename T>
__device__ Stats load(const SampleParams& p, const Settings& settings, int row, int begin, int n, float* values) {
  constexpr int kSize = Logits<T>::kSize;
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride + begin;
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const float* bias = p.bias ? p.bias + row * p.bias_stride + begin : nullptr;
  const int* counts = settings.counted ? p.counts + row * p.counts_stride + begin : nullptr;
  Stats mine{-INFINITY, 0.f, -INFINITY, n > 0 ? begin : 0x7fffffff};
  const auto take = [&](int first, float (&x)[kSize]) {
    const float top = largest(x);
    if (top > mine.raw_top) {
      mine.raw_sum *= exp2_approx((mine.raw_top - top) * kLog2E);
      mine.raw_top = top;
    }
    if (mine.raw_top > -INFINITY) {
#pragma unroll
      for (float value : x) mine.raw_sum += exp2_approx((value - mine.raw_top) * kLog2E);
    }
    if (bias || counts) {
#pragma unroll
      for (int i = 0; i < kSize; i++) {
        if (first + i >= n) continue;
        if (bias) x[i] = finite(x[i] + bias[first + i]);
        if (counts) x[i] = finite(settings.penalised(x[i], counts[first + i]));  // a penalty may have overflowed
      }
    }
#pragma unroll
    for (int i = 0; i < kSize; i++)
      if (x[i] > mine.top) mine.top = x[i], mine.token = begin + first + i;
#pragma unroll
    for (int i = 0; i < kSize; i += 4)
      *reinterpret_cast<float4*>(values + first + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  };
  for (int start = kSize * threadIdx.x; start < n; start += kSize * kThreads * kAhead) {
    Logits<T> ahead_of_use[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) ahead_of_use[i].load(logits, start + kSize * kThreads * i, n, aligned);
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int first = start + kSize * kThreads * i;
      if (first >= n) break;
      float x[kSize];
      ahead_of_use[i].unpack(logits, first, n, x);
      take(first, x);
    }
  }
  return mine;
}

// Four words of Philox4x32-7 (Salmon et al. 2011).
__device__ __forceinline__ uint4 philox(uint32_t index, uint64_t offset, uint64_t seed) {
  uint4 c = {index, static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; round++) {
    const uint64_t p0 = uint64_t{c.x} * 0xD2511F53u, p1 = uint64_t{c.z} * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c;
}

// Floats as integers of the same order, and back.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
__device__ __forceinline__ float unordered(int x) { return __int_as_float(x < 0 ? x ^ 0x7fffffff : x); }

// -log(e) of an exponential draw e, from 32 random bits; and a bound of it that takes no logarithm: -log(e) <= -log(u)
// <= (leading zeros + 1) log 2. Most tokens cannot win even with that.
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float u = fminf((__uint2float_rn(word) + 0.5f) * 0x1p-32f, 1.f - 0x1p-24f);
  return -logf(-log1pf(-u));
}
__device__ __forceinline__ float gumbel_bound(uint32_t word) { return (__clz(word) + 1) * 0.6931473f; }

struct Draw {
  float top, inverse, farthest;  // the largest logit, 1 / temperature, the distance up to which tokens are kept
  uint64_t seed, offset;

  // The best of this thread's tokens that are kept and nearer than `nearer`.
  __device__ Candidate best(const float* values, int begin, int n, float nearer) const {
    Candidate mine{-INFINITY, INFINITY, 0x7fffffff, 0};
    int bar = ordered(-INFINITY);  // the best score of the warp
    for (int start = threadIdx.x / 32 * 128; start < n; start += 4 * kThreads) {
      const int first = start + 4 * (threadIdx.x % 32);
      const float4 four = first < n ? *reinterpret_cast<const float4*>(values + first)
                                    : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
      const float distances[4] = {top - four.x, top - four.y, top - four.z, top - four.w};
      const float nearest = fminf(fminf(distances[0], distances[1]), fminf(distances[2], distances[3]));
      const bool live = nearest <= farthest && nearest < nearer;
      if (!__any_sync(~0u, live)) continue;
      const float least = unordered(bar);
      if (live) {
        const uint4 random = philox((begin + first) / 4, offset, seed);
        const uint32_t words[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float z = -distances[i] * inverse;
          if (!(z + gumbel_bound(words[i]) >= least)) continue;
          if (!(distances[i] <= farthest && distances[i] < nearer) || first + i >= n) continue;
          const float score = z + gumbel(words[i]);
          if (score > mine.score) mine = {score, distances[i], begin + first + i, 0};
        }
      }
      bar = max(bar, __reduce_max_sync(~0u, ordered(mine.score)));
    }
    return mine;
  }

  // Of this thread's tokens that are kept and nearer than `nearer`.
  __device__ Mass mass(const float* values, int n, float nearer) const {
    Mass mine{};
    for (int first = 4 * threadIdx.x; first < n; first += 4 * kThreads) {
      const float4 four = *reinterpret_cast<const float4*>(values + first);
      const float distances[4] = {top - four.x, top - four.y, top - four.z, top - four.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (distances[i] <= farthest && distances[i] < nearer && first + i < n)
          mine.mass += exp2_approx(-distances[i] * inverse * kLog2E);
      }
    }
    return mine;
  }
};

__device__ int draw(const SampleParams& p, const Settings& settings, int row, const Stats& stats, Row& of_row,
                    const float* values, int begin, int n) {
  const bool greedy = !(settings.temperature > 0.f);
  if (greedy || stats.top == -INFINITY) return greedy || stats.top > -INFINITY ? stats.token : 0;
  Draw draw{stats.top, fminf(1.f / settings.temperature, kMax), kMax, static_cast<uint64_t>(p.seeds[row]),
            static_cast<uint64_t>(p.offsets[row])};
  if (settings.min_p > 0.f) draw.farthest = fmaxf(0.f, -settings.temperature * logf(settings.min_p));
  if (settings.top_k > 0 && settings.top_k < p.vocabulary)
    draw.farthest = fminf(draw.farthest, __uint_as_float(of_row.kth(values, n, stats.top, settings.top_k)));
  const bool nucleus = settings.top_p < 1.f;
  const float enough = nucleus ? settings.top_p * of_row.merged(draw.mass(values, n, INFINITY)).mass : 0.f;
  for (float nearer = INFINITY;;) {
    const Candidate winner = of_row.merged(draw.best(values, begin, n, nearer));
    if (!nucleus || winner.distance == 0.f) return winner.token;
    if (of_row.merged(draw.mass(values, n, winner.distance)).mass < enough) return winner.token;
    nearer = winner.distance;
  }
}

// ---- rows of which every token may be drawn ----

// A thread's best token: its logit and its draw, which make a score relative to any other logit.
struct Best {
  float logit = -INFINITY, noise = 0.f;
  int token = 0x7fffffff;

  __device__ __forceinline__ float score(float top, float inverse) const {
    return token == 0x7fffffff ? -INFINITY : (logit - top) * inverse + noise;
  }
};

// One of four registers.
template <typename V>
__device__ __forceinline__ V pick(const V* values, int i) {
  const V low = i & 1 ? values[1] : values[0], high = i & 1 ? values[3] : values[2];
  return i & 2 ? high : low;
}

// Draws as it reads, and keeps nothing: sums and scores are relative to the largest logit that the warp has seen.
template <typename T>
__device__ int draw_any(const SampleParams& p, const Settings& settings, int row, Row& of_row, int begin, int n,
                        Stats& stats) {
  constexpr int kSize = Logits<T>::kSize;
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride + begin;
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const float inverse = fminf(1.f / settings.temperature, kMax);
  const uint64_t seed = p.seeds[row], offset = p.offsets[row];
  float top = -INFINITY, sum = 0.f, score = -INFINITY;
  int bar = ordered(-INFINITY);  // the best score of the warp
  Best best;
  for (int start = threadIdx.x / 32 * 32 * kSize; start < n; start += kSize * kThreads * kAhead) {
    const int mine = start + threadIdx.x % 32 * kSize;
    Logits<T> ahead_of_use[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) ahead_of_use[i].load(logits, mine + kSize * kThreads * i, n, aligned);
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (start + kSize * kThreads * i >= n) break;
      const int first = mine + kSize * kThreads * i;
      float x[kSize];
      ahead_of_use[i].unpack(logits, first, n, x);
      const float highest = unordered(__reduce_max_sync(~0u, ordered(largest(x))));
      if (highest > top) {
        sum *= exp2_approx((top - highest) * kLog2E);
        top = highest;
        score = best.score(top, inverse);
        bar = __reduce_max_sync(~0u, ordered(score));
      }
      if (top == -INFINITY) continue;
      const float least = unordered(bar);
#pragma unroll
      for (int four = 0; four < kSize; four += 4) {
        const uint4 random = philox((begin + first + four) / 4, offset, seed);
        const uint32_t words[4] = {random.x, random.y, random.z, random.w};
        int winning = 0;  // those that may win: few, in a loop, for logarithms in each place would be 60 KB of code
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float below = x[four + j] - top;
          sum += exp2_approx(below * kLog2E);
          winning |= (below * inverse + gumbel_bound(words[j]) >= least) << j;
        }
        while (winning) {
          const int j = __ffs(winning) - 1;
          winning &= winning - 1;
          const float value = pick(&x[four], j), noise = gumbel(pick(words, j)), z = (value - top) * inverse;
          if (z + noise > score) {
            score = z + noise;
            best = {value, noise, begin + first + four + j};
          }
        }
      }
      bar = max(bar, __reduce_max_sync(~0u, ordered(score)));
    }
  }
  of_row.await_blocks();
  stats = of_row.merged(Stats{top, sum, -INFINITY, 0x7fffffff});
  const Candidate winner = of_row.merged(Candidate{best.score(stats.raw_top, inverse), 0.f, best.token, 0});
  return winner.token == 0x7fffffff ? 0 : winner.token;
}

// The most likely tokens one after the other, each the best of those behind the one before.
template <typename T>
__device__ void list(const SampleParams& p, int row, float top, float log_sum, Row& of_row, int begin, int n,
                     bool writes) {
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride + begin;
  Candidate last{INFINITY, 0.f, -1, 0};
  for (int place = 0; place < p.num_logprobs; place++) {
    Candidate mine{-INFINITY, 0.f, 0x7fffffff, 0};
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const float x = finite(logits[i]);
      if (ahead(last.score, last.token, x, begin + i) && ahead(x, begin + i, mine.score, mine.token))
        mine = {x, 0.f, begin + i, 0};
    }
    last = of_row.merged(mine);
    if (writes) {
      p.top_tokens[int64_t{row} * p.num_logprobs + place] = last.token;
      p.top_logprobs[int64_t{row} * p.num_logprobs + place] = last.score - top - log_sum;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) sample_kernel(const __grid_constant__ SampleParams p, int part) {
  extern __shared__ __align__(16) float values[];
  __shared__ Shared shared;
  Row of_row(shared);
  const int row = blockIdx.x / kSampleCluster, rank = blockIdx.x % kSampleCluster;
  const int begin = rank * part, n = max(0, min(part, p.vocabulary - begin));
  const Settings settings(p, row);
  Stats stats;
  int token;
  if (settings.takes_any(p)) {
    token = draw_any<T>(p, settings, row, of_row, begin, n, stats);
  } else {
    const Stats mine = load<T>(p, settings, row, begin, n, values);
    of_row.await_blocks();
    stats = of_row.merged(mine);
    token = draw(p, settings, row, stats, of_row, values, begin, n);
  }
  const float top = stats.raw_top, log_sum = logf(stats.raw_sum);  // apart: beside a large `top` it would be lost
  if (rank == 0 && threadIdx.x == 0) {
    p.tokens[row] = token;
    p.logprobs[row] = finite(static_cast<const T*>(p.logits)[row * p.logits_stride + token]) - top - log_sum;
  }
  list<T>(p, row, top, log_sum, of_row, begin, n, rank == 0 && threadIdx.x == 0);
  cg::this_cluster().sync();  // no block may end while others write to its shared memory
}

}  // namespace

void sample(const SampleParams& p, cudaStream_t stream) {
  NVTX_FN();
  const int part = ((p.vocabulary + kSampleCluster - 1) / kSampleCluster + 7) / 8 * 8;
  cuda::dispatch_dtype(p.dtype, [&]<typename T>(T) {
    launch<sample_kernel<T>>({.grid = dim3(p.rows * kSampleCluster),
                              .threads = dim3(kThreads),
                              .shared_bytes = part * sizeof(float),
                              .cluster = dim3(kSampleCluster)},
                             stream, p, part);
  });
}

}  // namespace cs336
