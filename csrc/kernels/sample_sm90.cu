// A cluster of blocks holds a row of logits in shared memory: it is read once from memory and then as often as need be.
//
// The draw is an argmax of z - log(e), z = (logit - largest) / temperature, e an exponential draw of its own for each
// token. Few need their logarithms: a token whose e is so large that a score which the block has found is out of reach
// is told by one comparison of e's random bits with exp(z).
//
// top_k: the k-th largest by its bits, 11 at a time, from histograms of those no farther than k threads' nearest.
// top_p: a token is in the nucleus if the mass above it is less than top_p. The draw, an argmax over all tokens, is
// taken if it is in the nucleus; otherwise nothing below it is either, and the draw is made again from what is above.
// That is the argmax over the nucleus, without a sort. Sums are in a fixed order, so that a row's draw does not depend
// on its batch.
#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/mma.cuh"
#include "common/nvtx.h"
#include "common/vec.cuh"
#include "kernels/sample.h"

namespace cs336 {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256, kWarps = kThreads / 32, kBins = kThreads * kSampleCluster;
constexpr int kBinBits = 11;
static_assert(kBins == 1 << kBinBits);
constexpr int kMostNear = 512;  // tokens, of which the k-th is found by comparing each with each
constexpr int kParts = 4;       // of a block's logits, which are used as they come
constexpr float kLog2E = 1.4426950408889634f, kMax = 3.402823466e38f;
constexpr int kNone = 0x7fffffff;  // no token

struct Stats {  // of the logits as they came in: maximum and sum of exp(logit - maximum); then of what is drawn from
  float raw_top, raw_sum, top;
  int token;
};
struct Candidate {
  float score, distance, mass;  // distance: below the largest logit; mass: of all that could be drawn
  int token;
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
  Candidate c = ahead(b.score, b.token, a.score, a.token) ? b : a;
  c.mass = a.mass + b.mass;
  return c;
}
__device__ __forceinline__ Mass merge(const Mass& a, const Mass& b) { return {a.mass + b.mass}; }

template <int kSize>
__device__ __forceinline__ float largest(const float (&x)[kSize]) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < kSize; i++) top = fmaxf(top, x[i]);
  return top;
}

// Sixteen bytes of what is drawn from, as load() has put it into shared memory: without NaN, and no +inf.
template <typename Kept>
__device__ __forceinline__ void fetch(const Kept* values, float (&x)[kVec<Kept>]) {
  unpack<Kept>(*reinterpret_cast<const uint4*>(values), x);
  if constexpr (sizeof(Kept) < 4) {  // 16 bits have no number that stands for kMax
#pragma unroll
    for (int i = 0; i < kVec<Kept>; i++) x[i] = fminf(x[i], kMax);
  }
}

struct Shared {
  int histogram[kBins];
  uint4 of_warps[kWarps];
  uint4 of_blocks[2][kSampleCluster];
  int sums[kWarps], totals[kSampleCluster];
  int bin, left, near;
  float chance;  // what a token's random bits may be at most, times its exp(z), to reach the best score of the block
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
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    mine = of_lanes<32>(mine);
    if (lane == 0) shared_.of_warps[warp] = reinterpret_cast<uint4&>(mine);
    __syncthreads();
    uint4* slots = shared_.of_blocks[turn_];
    turn_ ^= 1;
    if (warp == 0) {
      uint4 words = shared_.of_warps[lane % kWarps];
      R all = of_lanes<kWarps>(reinterpret_cast<R&>(words));
      if (lane < kSampleCluster)
        cluster_.map_shared_rank(slots, lane)[cluster_.block_rank()] = reinterpret_cast<uint4&>(all);
    }
    cluster_.sync();
    uint4 words = slots[lane % kSampleCluster];
    return of_lanes<kSampleCluster>(reinterpret_cast<R&>(words));
  }

  // The bits of the distance of the k-th nearest to the top, k >= 1, of n values in shared memory a block. `nearest` is
  // this thread's nearest of them.
  template <typename Kept>
  __device__ uint32_t kth(const Kept* values, int n, float top, float nearest, int k) {
    uint32_t edge = ~0u;
    if (k <= kBins) {  // the k-th of all is no farther than the k-th of threads' nearest: few are
      if (threadIdx.x == 0) shared_.near = 0;
      clear();
      count(__float_as_uint(nearest) >> kLowest);
      cluster_.sync();
      find(k);
      edge = static_cast<uint32_t>(shared_.bin) << kLowest | ((1u << kLowest) - 1);
      gather(values, n, top, edge);
      cluster_.sync();
      if (shared_.near <= kMostNear) return kth_near(k);
    }
    uint32_t found = 0;
    for (int high = 31; high > 0;) {  // distances are not negative: 31 bits
      const int bits = min(high, kBinBits), low = high - bits;
      clear();
      for (int first = kVec<Kept> * threadIdx.x; first < n; first += kVec<Kept> * kThreads) {
        float x[kVec<Kept>];
        fetch(values + first, x);
        if (__float_as_uint(top - largest(x)) > edge) continue;
#pragma unroll
        for (int i = 0; i < kVec<Kept>; i++) {
          const uint32_t key = __float_as_uint(top - x[i]);
          if (key <= edge && (high == 31 || key >> high == found)) count(key >> low & ((1 << bits) - 1));
        }
      }
      cluster_.sync();
      k = find(k);
      found = found << bits | shared_.bin;
      high = low;
    }
    return found;
  }

 private:
  static constexpr int kLowest = 31 - kBinBits;  // of the bits that a first histogram counts by

  // Puts the distances up to `edge` into a list in every block, in any order, where the histogram was.
  template <typename Kept>
  __device__ void gather(const Kept* values, int n, float top, uint32_t edge) {
    for (int first = kVec<Kept> * threadIdx.x; first < n; first += kVec<Kept> * kThreads) {
      float x[kVec<Kept>];
      fetch(values + first, x);
      if (__float_as_uint(top - largest(x)) > edge) continue;
#pragma unroll
      for (int i = 0; i < kVec<Kept>; i++) {
        const int key = __float_as_int(top - x[i]);
        if (static_cast<uint32_t>(key) > edge) continue;
#pragma unroll 1
        for (int r = 0; r < kSampleCluster; r++) {
          const int place = atomicAdd(cluster_.map_shared_rank(&shared_.near, r), 1);
          if (place < kMostNear) cluster_.map_shared_rank(shared_.histogram, r)[place] = key;
        }
      }
    }
  }

  // The k-th of the list.
  __device__ uint32_t kth_near(int k) {
    for (int i = threadIdx.x; i < shared_.near; i += kThreads) {
      const int mine = shared_.histogram[i];
      int nearer = 0, equal = 0;
      for (int j = 0; j < shared_.near; j++) {
        const int other = shared_.histogram[j];
        nearer += other < mine;
        equal += other == mine;
      }
      if (nearer < k && k <= nearer + equal) shared_.bin = mine;  // whoever finds it finds the same
    }
    __syncthreads();
    return shared_.bin;
  }

  __device__ void clear() {
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared_.histogram[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void count(int bin) { atomicAdd(&shared_.histogram[bin], 1); }

  // What the first kLanes lanes have, merged, in all lanes.
  template <int kLanes, typename R>
  static __device__ R of_lanes(R mine) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      uint4 words = reinterpret_cast<uint4&>(mine);
      words = {__shfl_down_sync(~0u, words.x, offset), __shfl_down_sync(~0u, words.y, offset),
               __shfl_down_sync(~0u, words.z, offset), __shfl_down_sync(~0u, words.w, offset)};
      mine = merge(mine, reinterpret_cast<R&>(words));
    }
    uint4 words = reinterpret_cast<uint4&>(mine);
    words = {__shfl_sync(~0u, words.x, 0), __shfl_sync(~0u, words.y, 0), __shfl_sync(~0u, words.z, 0),
             __shfl_sync(~0u, words.w, 0)};
    return reinterpret_cast<R&>(words);
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
  return fminf(fmaxf(to_float(x), -INFINITY), kMax);
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

  __device__ __forceinline__ float penalised(float x, int count) const {
    if (count > 0) x = x > 0.f ? x / repetition : x * repetition;
    const int generated = count & (kInPrompt - 1);
    x -= frequency * generated;
    return generated > 0 ? x - presence : x;
  }
};

// Sixteen bytes of logits, of any alignment; -inf behind the row's end.
template <typename T>
__device__ __forceinline__ uint4 load_logits(const T* row, int first, int n) {
  float x[kVec<T>];
#pragma unroll
  for (int i = 0; i < kVec<T>; i++) x[i] = first + i < n ? to_float(row[first + i]) : -INFINITY;
  return pack<T>(x);
}

// Copies of parts are waited for one after the other.
__device__ __forceinline__ void wait_for_part(int i) {
  static_assert(kParts == 4);
  if (i == 0) wait_copies<3>();
  if (i == 1) wait_copies<2>();
  if (i == 2) wait_copies<1>();
  if (i == 3) wait_copies<0>();
}

// Puts this block's part of the row, from `begin` on, into shared memory: without NaN and +inf, and behind its end -inf
// up to a vector. All of it is on its way at once, and each thread takes what it has asked for as it comes.
template <typename T, typename Kept>
__device__ Stats load(const SampleParams& p, int row, int begin, int n, Kept* values) {
  constexpr int kSize = kVec<T>;
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride + begin;
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const int part = (n + kSize * kThreads * kParts - 1) / (kSize * kThreads * kParts) * kSize * kThreads;
  if constexpr (std::is_same_v<T, Kept>) {
#pragma unroll 1
    for (int i = 0; i < kParts; i++) {  // of which blocks behind a small vocabulary's end have none
      for (int first = i * part + kSize * threadIdx.x; first < min(n, (i + 1) * part); first += kSize * kThreads) {
        if (aligned && first + kSize <= n)
          copy_async(reinterpret_cast<uint4*>(values + first), logits + first, true);
        else
          store<T>(values, first, load_logits(logits, first, n));
      }
      commit_copies();
    }
  }
  Stats mine{-kMax, 0.f, -INFINITY, 0};
  const auto take = [&](int first, uint4 packed) {
    float x[kSize];
    unpack<T>(packed, x);
#pragma unroll
    for (int i = 0; i < kSize; i++) x[i] = finite(x[i]);
    const float top = largest(x);
    if (top > mine.top) mine.top = top, mine.token = first;
    if (top > mine.raw_top) {
      mine.raw_sum *= exp2_approx((mine.raw_top - top) * kLog2E);
      mine.raw_top = top;
    }
#pragma unroll
    for (int i = 0; i < kSize; i++) mine.raw_sum += exp2_approx((x[i] - mine.raw_top) * kLog2E);
    if constexpr (std::is_same_v<T, Kept>) {
      store<Kept>(values, first, pack<Kept>(x));
    } else {
      *reinterpret_cast<float4*>(values + first) = make_float4(x[0], x[1], x[2], x[3]);
      *reinterpret_cast<float4*>(values + first + 4) = make_float4(x[4], x[5], x[6], x[7]);
    }
  };
#pragma unroll
  for (int i = 0; i < kParts; i++) {
    if constexpr (std::is_same_v<T, Kept>) wait_for_part(i);
    for (int first = i * part + kSize * threadIdx.x; first < min(n, (i + 1) * part); first += kSize * kThreads) {
      if constexpr (std::is_same_v<T, Kept>)
        take(first, *reinterpret_cast<const uint4*>(values + first));
      else
        take(first, load_logits(logits, first, n));
    }
  }
  if (mine.top > -INFINITY) {
    int place = 0;  // of the first of the vector's that is the largest
#pragma unroll
    for (int v = kSize - kVec<Kept>; v >= 0; v -= kVec<Kept>) {
      float x[kVec<Kept>];
      fetch(values + mine.token + v, x);
#pragma unroll
      for (int i = kVec<Kept> - 1; i >= 0; i--)
        if (x[i] == mine.top) place = v + i;
    }
    mine.token += place;
  }
  mine.token = n > 0 ? begin + mine.token : kNone;
  return mine;
}

// Bias and penalties.
__device__ void change(const SampleParams& p, const Settings& settings, int row, int begin, int n, float* values,
                       Stats& mine) {
  const float* bias = p.bias ? p.bias + row * p.bias_stride + begin : nullptr;
  const int* counts = settings.counted ? p.counts + row * p.counts_stride + begin : nullptr;
  if (!bias && !counts) return;
  __syncthreads();
  mine.top = -INFINITY;
  mine.token = threadIdx.x < n ? begin + threadIdx.x : kNone;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    float x = values[i];
    if (bias) x = finite(x + bias[i]);
    if (counts) x = finite(settings.penalised(x, counts[i]));  // a penalty may have overflowed
    values[i] = x;
    if (x > mine.top) mine.top = x, mine.token = begin + i;
  }
}

struct Product {
  uint32_t low, high;
};
__device__ __forceinline__ Product product(uint32_t a, uint32_t b) {
  Product ab;
  asm("{ .reg .b64 ab; mul.wide.u32 ab, %2, %3; mov.b64 {%0, %1}, ab; }"
      : "=r"(ab.low), "=r"(ab.high)
      : "r"(a), "r"(b));
  return ab;
}

// Four words of Philox4x32-7 (Salmon et al. 2011) of each of two counters, which share their keys.
__device__ __forceinline__ void philox(const uint32_t (&index)[2], uint64_t offset, uint64_t seed, uint4 (&words)[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++)
    words[i] = {index[i], static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  asm volatile("" : "+r"(k0), "+r"(k1));  // or the keys of all rounds would be kept, in local memory
#pragma unroll
  for (int round = 0; round < 7; round++) {
#pragma unroll
    for (uint4& c : words) {
      const Product p0 = product(c.x, 0xD2511F53u), p1 = product(c.z, 0xCD9E8D57u);
      c = {p1.high ^ c.y ^ k0, p1.low, p0.high ^ c.w ^ k1, p0.low};
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

// Floats as integers of the same order, and back.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
__device__ __forceinline__ float unordered(int x) { return __int_as_float(x < 0 ? x ^ 0x7fffffff : x); }

// -log(e) of an exponential draw e, from 32 random bits. It is at most -log(u).
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float u = fminf((__uint2float_rn(word) + 0.5f) * 0x1p-32f, 1.f - 0x1p-24f);
  return -logf(-log1pf(-u));
}
constexpr float kLeastGumbel = -2.82f;  // and so the least score of the largest logit

// A token reaches a score s if -log(u) >= s - z: if its random bits, u * 2^32, are at most exp(z) times this. A bit
// more, for all of it is rounded.
__device__ __forceinline__ float chance_of(float score) { return exp2_approx(32.f - score * kLog2E) * 1.0001f; }

// One of four registers.
template <typename V>
__device__ __forceinline__ V pick(const V (&values)[4], int i) {
  const V low = i & 1 ? values[1] : values[0], high = i & 1 ? values[3] : values[2];
  return i & 2 ? high : low;
}

class Draw {
 public:
  __device__ Draw(const SampleParams& p, const Settings& settings, int row, float top)
      : top_(top), inverse_(fminf(1.f / settings.temperature, kMax)), seed_(p.seeds[row]), offset_(p.offsets[row]) {}

  // The best of this thread's tokens that are no farther than `farthest`, and the mass of these.
  // kAll: that is all of them.
  template <bool kAll, typename Kept>
  __device__ Candidate best(const Kept* values, int begin, int n, float farthest, float& chance) const {
    if (threadIdx.x == 0) chance = chance_of(kLeastGumbel);
    __syncthreads();
    constexpr bool kWide = sizeof(Kept) == 4;
    const float scale = exponent();
    Candidate mine{-INFINITY, INFINITY, 0.f, kNone};
    const int lane = threadIdx.x % 32;
    for (int start = threadIdx.x / 32 * 256; start < n; start += 8 * kThreads) {
      // Two times four neighbours, and the first of each.
      const int first[2] = {start + (kWide ? 4 : 8) * lane, start + (kWide ? 4 : 8) * lane + (kWide ? 128 : 4)};
      float d[8];
      if constexpr (kWide) {
        float near[4], far[4];
        distances(values, first[0], n, near);
        distances(values, first[1], n, far);
#pragma unroll
        for (int i = 0; i < 4; i++) d[i] = near[i], d[4 + i] = far[i];
      } else {
        distances(values, first[0], n, d);
      }
      if (!kAll) {
        float nearest = d[0];
#pragma unroll
        for (int i = 1; i < 8; i++) nearest = fminf(nearest, d[i]);
        if (!__any_sync(~0u, nearest <= farthest)) continue;
      }
      uint4 random[2];
      philox({static_cast<uint32_t>(begin + first[0]) / 4, static_cast<uint32_t>(begin + first[1]) / 4}, offset_, seed_,
             random);
      const float least = *const_cast<volatile float*>(&chance);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        Four four{{d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]},
                  {},
                  {random[i].x, random[i].y, random[i].z, random[i].w},
                  begin + first[i]};
        bool wins = false;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          four.p[j] = kAll || four.d[j] <= farthest ? exp2_approx(four.d[j] * scale) : 0.f;
          mine.mass += four.p[j];
          wins |= four.may_reach(j, least);
        }
        if (__any_sync(~0u, wins)) contend(four, mine, chance);
      }
    }
    return mine;
  }

  // Of this thread's tokens that are no farther than `farthest`.
  template <typename Kept>
  __device__ Mass mass(const Kept* values, int n, float farthest) const {
    const float scale = exponent();
    Mass mine{};
    for (int first = kVec<Kept> * threadIdx.x; first < n; first += kVec<Kept> * kThreads) {
      float d[kVec<Kept>];
      distances(values, first, n, d);
#pragma unroll
      for (int i = 0; i < kVec<Kept>; i++) mine.mass += d[i] <= farthest ? exp2_approx(d[i] * scale) : 0.f;
    }
    return mine;
  }

 private:
  struct Four {        // tokens that share a counter
    float d[4], p[4];  // p: exp(z), 0 where they are not drawn from
    uint32_t words[4];
    int token;

    __device__ __forceinline__ bool may_reach(int j, float chance) const {
      return __uint2float_rn(words[j]) <= p[j] * chance;
    }
  };

  __device__ __forceinline__ float exponent() const { return -fminf(inverse_ * kLog2E, kMax); }

  template <typename Kept>
  __device__ __forceinline__ void distances(const Kept* values, int first, int n, float (&d)[kVec<Kept>]) const {
    if (first < n) fetch(values + first, d);
#pragma unroll
    for (int i = 0; i < kVec<Kept>; i++) d[i] = first < n ? top_ - d[i] : INFINITY;
  }

  // Takes the logarithms of those that may win, one a lane at a time: each makes it harder for the others.
  __device__ void contend(const Four& four, Candidate& mine, float& chance) const {
    for (int left = 15;;) {
      const float least = *const_cast<volatile float*>(&chance);
      int winning = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) winning |= (four.p[j] > 0.f && four.may_reach(j, least)) << j;
      winning &= left;
      if (!__any_sync(~0u, winning)) return;
      if (winning) {
        const int j = __ffs(winning) - 1;
        left ^= 1 << j;
        const float distance = pick(four.d, j), score = gumbel(pick(four.words, j)) - distance * inverse_;
        if (score > mine.score) mine.score = score, mine.distance = distance, mine.token = four.token + j;
      }
      const float best = unordered(__reduce_max_sync(~0u, ordered(mine.score)));
      if (threadIdx.x % 32 == 0) atomicMin(reinterpret_cast<int*>(&chance), __float_as_int(chance_of(best)));
      __syncwarp();
    }
  }

  float top_, inverse_;
  uint64_t seed_, offset_;
};

// `nearest`: the distance of this thread's nearest token.
template <typename Kept>
__device__ int draw(const SampleParams& p, const Settings& settings, int row, const Stats& stats, float nearest,
                    Row& of_row, const Kept* values, int begin, int n, float& chance) {
  const bool greedy = !(settings.temperature > 0.f);
  if (greedy || stats.top == -INFINITY) return greedy || stats.top > -INFINITY ? stats.token : 0;
  float farthest = kMax;
  if (settings.min_p > 0.f) farthest = fmaxf(0.f, -settings.temperature * logf(settings.min_p));
  if (settings.top_k > 0 && settings.top_k < p.vocabulary)
    farthest = fminf(farthest, __uint_as_float(of_row.kth(values, n, stats.top, nearest, settings.top_k)));
  const Draw draw(p, settings, row, stats.top);
  const bool nucleus = settings.top_p < 1.f;
  float enough = -1.f;
  for (bool all = farthest == kMax;; all = false) {
    const Candidate winner = of_row.merged(all ? draw.template best<true>(values, begin, n, farthest, chance)
                                               : draw.template best<false>(values, begin, n, farthest, chance));
    if (!nucleus || winner.distance == 0.f) return winner.token;
    if (enough < 0.f) enough = settings.top_p * winner.mass;
    farthest = __uint_as_float(__float_as_uint(winner.distance) - 1);  // the next that is nearer
    if (of_row.merged(draw.mass(values, n, farthest)).mass < enough) return winner.token;
  }
}

// The most likely tokens one after the other, each the best of those behind the one before.
template <typename T>
__device__ void list(const SampleParams& p, int row, float top, float log_sum, Row& of_row, int begin, int n,
                     bool writes) {
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride + begin;
  Candidate last{INFINITY, 0.f, 0.f, -1};
  for (int place = 0; place < p.num_logprobs; place++) {
    Candidate mine{-INFINITY, 0.f, 0.f, kNone};
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const float x = finite(logits[i]);
      if (ahead(last.score, last.token, x, begin + i) && ahead(x, begin + i, mine.score, mine.token))
        mine = {x, 0.f, 0.f, begin + i};
    }
    last = of_row.merged(mine);
    if (writes) {
      p.top_tokens[int64_t{row} * p.num_logprobs + place] = last.token;
      p.top_logprobs[int64_t{row} * p.num_logprobs + place] = last.score - top - log_sum;
    }
  }
}

// Kept: the type of what is drawn from, in shared memory; the logits' own where they are drawn from as they came in.
template <typename T, typename Kept>
__global__ void __launch_bounds__(kThreads, sizeof(Kept) == 4 ? 3 : 4)
    sample_kernel(const __grid_constant__ SampleParams p, int part) {
  extern __shared__ __align__(16) char memory[];
  __shared__ Shared shared;
  Kept* values = reinterpret_cast<Kept*>(memory);
  Row of_row(shared);
  const int row = blockIdx.x / kSampleCluster, rank = blockIdx.x % kSampleCluster;
  const int begin = rank * part, n = max(0, min(part, p.vocabulary - begin));
  const Settings settings(p, row);
  Stats mine = load<T>(p, row, begin, n, values);
  if constexpr (std::is_same_v<Kept, float>) change(p, settings, row, begin, n, values, mine);
  of_row.await_blocks();
  const Stats stats = of_row.merged(mine);
  const int token = draw(p, settings, row, stats, stats.top - mine.top, of_row, values, begin, n, shared.chance);
  const float top = stats.raw_top, log_sum = logf(stats.raw_sum);  // apart: beside a large `top` it would be lost
  if (rank == 0 && threadIdx.x == 0) {
    p.tokens[row] = token;
    p.logprobs[row] = finite(static_cast<const T*>(p.logits)[row * p.logits_stride + token]) - top - log_sum;
  }
  list<T>(p, row, top, log_sum, of_row, begin, n, rank == 0 && threadIdx.x == 0);
}

template <typename T, typename Kept>
void launch_sample(const SampleParams& p, cudaStream_t stream) {
  const int part = ((p.vocabulary + kSampleCluster - 1) / kSampleCluster + 7) / 8 * 8;
  launch<sample_kernel<T, Kept>>({.grid = dim3(p.rows * kSampleCluster),
                                  .threads = dim3(kThreads),
                                  .shared_bytes = part * sizeof(Kept),
                                  .cluster = dim3(kSampleCluster)},
                                 stream, p, part);
}

}  // namespace

void sample(const SampleParams& p, cudaStream_t stream) {
  NVTX_FN();
  cuda::dispatch_dtype(p.dtype, [&]<typename T>(T) {
    if (p.bias || p.counts)
      launch_sample<T, float>(p, stream);
    else
      launch_sample<T, T>(p, stream);
  });
}

}  // namespace cs336
