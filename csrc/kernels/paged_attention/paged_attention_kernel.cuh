// One launch: four warps, a team (a block, or half of one), take the tiles of a piece in turn, each with a running
// softmax and a stream of copies of its own; at the end of a piece the block adds the four up. A block that has all of
// a segment adds its pieces up as it goes and writes the result. Otherwise blocks leave their parts in the workspace,
// and the last to come adds them up.
#pragma once
#include "common/mma.cuh"
#include "common/vec.cuh"
#include "kernels/paged_attention/stream.cuh"

namespace cs336::paged {

inline constexpr float kLeast = -1e30f;  // a maximum over nothing: finite, so that differences are
inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
inline constexpr int kHalf = 8;  // rows that warps exchange at a time

template <int kDim>
inline constexpr int kStages = kDim <= 64 ? 6 : 3;

template <int kDim>
struct Shared {
  Tile<kDim> tiles[kWarps][kStages<kDim>];
  float o[kWarps][kHalf * kDim];
  float top[kWarps][kRows], sum[kWarps][kRows];
  int scratch[kWarps + 2];
  Segment ended;  // that begins in an earlier block's share and ends in this block's
};

__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// ---- a warp's running softmax over its tiles of a piece ----

template <typename T, int kDim>
struct WarpRows {
  uint32_t q[kDim / 16][4];
  float o[kDim / 8][4];
  float top[2], sum[2];  // of rows lane / 4 and lane / 4 + 8; the sum is this lane's part
  int position[2];       // of those rows' queries

  __device__ __forceinline__ void load(const PagedAttentionParams& p, const PagedPlan& plan, const Segment& s) {
    const int lane = thread_of_team() % 32, head = s.index / plan.row_tiles * p.group;
    const T* rows[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = s.index % plan.row_tiles * kRows + lane / 4 + 8 * i, query = r / p.group;
      position[i] = s.sequence.length - p.queries + query;
      rows[i] = query < p.queries ? static_cast<const T*>(p.q) + s.b * p.q_batch_stride + query * p.q_token_stride +
                                        (head + r % p.group) * p.q_head_stride + lane % 4 * 2
                                  : nullptr;
    }
#pragma unroll
    for (int k = 0; k < kDim / 16; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const T* row = rows[i % 2];
        q[k][i] = row ? *reinterpret_cast<const uint32_t*>(row + k * 16 + i / 2 * 8) : 0;
      }
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& part : o) part[0] = part[1] = part[2] = part[3] = 0.f;
    top[0] = top[1] = kLeast;
    sum[0] = sum[1] = 0.f;
  }

  __device__ __forceinline__ void add(const PagedAttentionParams& p, const Tile<kDim>& tile, int first_key,
                                      int length) {
    const int lane = thread_of_team() % 32;
    float s[2][4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; k++) {
      uint32_t b[4];
      load_tiles(b, tile.keys + Tile<kDim>::at(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      multiply_add<T>(s[0], q[k], b[0], b[1]);
      multiply_add<T>(s[1], q[k], b[2], b[3]);
    }
    to_log2(p, s);
    if (first_key + kTile > length - p.queries + 1 || (p.window >= 0 && first_key < length - 1 - p.window))
      hide(p, s, first_key + lane % 4 * 2);
    weigh(s);
    const uint32_t weights[4] = {pack_pair<T>(s[0][0], s[0][1]), pack_pair<T>(s[0][2], s[0][3]),
                                 pack_pair<T>(s[1][0], s[1][1]), pack_pair<T>(s[1][2], s[1][3])};
#pragma unroll
    for (int n = 0; n < kDim / 16; n++) {
      uint32_t b[4];
      load_tiles_transposed(b, tile.values + Tile<kDim>::at(lane % 16, 2 * n + lane / 16));
      multiply_add<T>(o[2 * n], weights, b[0], b[1]);
      multiply_add<T>(o[2 * n + 1], weights, b[2], b[3]);
    }
  }

 private:
  // Products to scores in powers of 2. The soft-cap's tanh is exact to 2^-22: tanh.approx is off by 2^-11.
  static __device__ __forceinline__ void to_log2(const PagedAttentionParams& p, float (&s)[2][4]) {
    const float scale = p.scale * kLog2E, inner = p.softcap > 0 ? p.scale / p.softcap * (2 * kLog2E) : 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float& x = s[i / 4][i % 4];
      x = p.softcap > 0 ? p.softcap * kLog2E * (1.f - __fdividef(2.f, 1.f + exp2_approx(x * inner))) : x * scale;
    }
  }

  __device__ __forceinline__ void hide(const PagedAttentionParams& p, float (&s)[2][4], int key) const {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int distance = position[i / 2 % 2] - (key + i / 4 * 8 + i % 2);
      if (distance < 0 || (p.window >= 0 && distance > p.window)) s[i / 4][i % 4] = -INFINITY;
    }
  }

  __device__ __forceinline__ void weigh(float (&s)[2][4]) {
    float largest[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float of_lane = fmaxf(fmaxf(s[0][2 * i], s[0][2 * i + 1]), fmaxf(s[1][2 * i], s[1][2 * i + 1]));
      largest[i] = fmaxf(top[i], max_of_quad(of_lane));
    }
    if (__any_sync(~0u, largest[0] > top[0] || largest[1] > top[1])) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float fade = exp2_approx(top[i] - largest[i]);
        top[i] = largest[i];
        sum[i] *= fade;
#pragma unroll
        for (auto& part : o) part[2 * i] *= fade, part[2 * i + 1] *= fade;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float& x = s[i / 4][i % 4];
      x = exp2_approx(x - top[i / 2 % 2]);
      sum[i / 2 % 2] += x;
    }
  }
};

// ---- sums over pieces ----

struct Total {  // four features of a row
  float top, sum, o[4];

  __device__ __forceinline__ void clear() { *this = {kLeast, 0.f, {}}; }
  __device__ __forceinline__ void add(float other_top, float other_sum, const float4& other) {
    const float largest = fmaxf(top, other_top);
    const float mine = exp2_approx(top - largest), its = exp2_approx(other_top - largest);
    top = largest;
    sum = fmaf(sum, mine, other_sum * its);
    const float values[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
    for (int i = 0; i < 4; i++) o[i] = fmaf(o[i], mine, values[i] * its);
  }
};

// A block's threads over the (16, kDim) results of a segment: thread t has four features of kTotals rows.
template <typename T, int kDim>
struct BlockRows {
  static constexpr int kPerHalf = kHalf * kDim / 4 / kThreads, kTotals = 2 * kPerHalf;
  Total totals[kTotals];
  int rows;  // of the tile that exist

  static __device__ __forceinline__ int row(int i) {
    return i / kPerHalf * kHalf + (thread_of_team() + i % kPerHalf * kThreads) / (kDim / 4);
  }
  static __device__ __forceinline__ int column() { return thread_of_team() % (kDim / 4) * 4; }

  __device__ __forceinline__ void begin(const PagedAttentionParams& p, const PagedPlan& plan, const Segment& s) {
    rows = min(kRows, p.group * p.queries - s.index % plan.row_tiles * kRows);
#pragma unroll
    for (auto& total : totals) total.clear();
  }

  // Adds the warps' parts of a piece up, and the sum to the totals, or writes it to o and stats if there are such.
  __device__ __forceinline__ void gather(Shared<kDim>& shared, const WarpRows<T, kDim>& mine, float* o, float2* stats) {
    const int lane = thread_of_team() % 32, warp = thread_of_team() / 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float sum = sum_of_quad(mine.sum[i]);
      if (lane % 4 == 0) shared.top[warp][lane / 4 + 8 * i] = mine.top[i], shared.sum[warp][lane / 4 + 8 * i] = sum;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (half * kHalf >= rows) break;
      if (half * kHalf + lane / 4 < rows) {
#pragma unroll
        for (int n = 0; n < kDim / 8; n++)
          *reinterpret_cast<float2*>(&shared.o[warp][at(lane / 4, n * 8 + lane % 4 * 2)]) =
              make_float2(mine.o[n][2 * half], mine.o[n][2 * half + 1]);
      }
      sync_team();
#pragma unroll
      for (int i = half * kPerHalf; i < (half + 1) * kPerHalf; i++) {
        const int r = row(i);
        if (r >= rows) continue;
        Total piece;
        piece.clear();
#pragma unroll
        for (int w = 0; w < kWarps; w++)
          piece.add(shared.top[w][r], shared.sum[w][r],
                    *reinterpret_cast<const float4*>(&shared.o[w][at(r % kHalf, column())]));
        const float4 values = make_float4(piece.o[0], piece.o[1], piece.o[2], piece.o[3]);
        if (o) {
          *reinterpret_cast<float4*>(o + r * kDim + column()) = values;
          if (column() == 0) stats[r] = make_float2(piece.top, piece.sum);
        } else {
          totals[i].add(piece.top, piece.sum, values);
        }
      }
      sync_team();
    }
  }

  // Adds up the parts of a segment that blocks have left in the workspace, in order.
  __device__ __forceinline__ void collect(const PagedPlan& plan, const Parts& parts, const float* o,
                                          const float2* stats) {
    constexpr int kAhead = 8;
    for (int first = 0; first < parts.count(); first += kAhead) {
      int64_t slots[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; j++) slots[j] = parts.slot(min(first + j, parts.count() - 1)) * plan.rows;
#pragma unroll
      for (int i = 0; i < kTotals; i++) {
        const int r = row(i);
        if (r >= rows) continue;
        float4 values[kAhead];
        float2 of_row[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; j++) {
          values[j] = __ldcg(reinterpret_cast<const float4*>(o + (slots[j] + r) * kDim + column()));
          of_row[j] = __ldcg(stats + slots[j] + r);
        }
#pragma unroll
        for (int j = 0; j < kAhead; j++)
          if (first + j < parts.count()) totals[i].add(of_row[j].x, of_row[j].y, values[j]);
      }
    }
  }

  __device__ __forceinline__ void write(const PagedAttentionParams& p, const PagedPlan& plan, const Segment& s) {
#pragma unroll
    for (int i = 0; i < kTotals; i++) {
      if (row(i) >= rows) continue;
      const int r = s.index % plan.row_tiles * kRows + row(i), query = r / p.group, heads = p.kv_heads * p.group;
      const int head = s.index / plan.row_tiles * p.group + r % p.group;
      Total& total = totals[i];
      if (p.sinks) total.add(__ldg(p.sinks + head) * kLog2E, 1.f, make_float4(0.f, 0.f, 0.f, 0.f));
      const float scale = total.sum > 0.f ? 1.f / total.sum : 0.f;
      const uint2 packed = {pack_pair<T>(total.o[0] * scale, total.o[1] * scale),
                            pack_pair<T>(total.o[2] * scale, total.o[3] * scale)};
      T* o = static_cast<T*>(p.o) + ((int64_t{s.b} * p.queries + query) * heads + head) * kDim;
      *reinterpret_cast<uint2*>(o + column()) = packed;
      if (column() == 0)
        p.lse[(int64_t{s.b} * heads + head) * p.queries + query] =
            total.sum > 0.f ? (total.top + __log2f(total.sum)) * kLn2 : -INFINITY;
    }
  }

 private:
  static __device__ __forceinline__ int at(int row,
                                           int column) {  // groups of 8 features swapped against bank conflicts
    return row * kDim + ((column / 8 ^ row) * 8 + column % 8);
  }
};

// ---- the kernel ----

// This block's share: the block adds up the tiles of all sequences. `shared` has kWarps + 2 ints.
__device__ __forceinline__ Share find_share(const PagedAttentionParams& p, const PagedPlan& plan, int* shared) {
  const int each = ceil_div(p.sequences, kThreads), first = thread_of_team() * each;
  const int last = min(p.sequences, first + each), lane = thread_of_team() % 32, warp = thread_of_team() / 32;
  int mine = 0;
  for (int b = first; b < last; b++) mine += sequence_of(p, b).cost();
  int before = mine;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0u, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) shared[warp] = before;
  before -= mine;
  sync_team();
  int all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    if (w < warp) before += shared[w];
    all += shared[w];
  }
  Share share(plan, int64_t{all} * plan.segments, team());
  int start = before * plan.segments;
  if (start <= share.begin && share.begin < start + mine * plan.segments) {
    int b = first;
    for (;; b++) {
      const int after = start + sequence_of(p, b).cost() * plan.segments;
      if (after > share.begin) break;
      start = after;
    }
    shared[kWarps] = b;
    shared[kWarps + 1] = start;
  }
  sync_team();
  share.b = shared[kWarps];
  share.start = shared[kWarps + 1];
  return share;
}

// A block's part of a segment is in the workspace when the flag of its first piece holds the launch's tag. The block
// that waits for it, one with a higher index than those it waits for and so started after them, takes the flag down
// again: a graph launches with one tag always.
__device__ __forceinline__ void raise(uint64_t* flag, uint64_t tag) {
  __threadfence();
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(tag) : "memory");
}
__device__ __forceinline__ void await(uint64_t* flag, uint64_t tag) {
  uint64_t now;
  do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(flag) : "memory");
  while (now != tag);
  *flag = 0;
}

template <typename T, int kDim>
__global__ void __launch_bounds__(2 * kThreads, 1)
    paged_attention_kernel(const __grid_constant__ PagedAttentionParams p, const __grid_constant__ PagedPlan plan) {
  extern __shared__ __align__(128) unsigned char dynamic[];
  Shared<kDim>& shared = reinterpret_cast<Shared<kDim>*>(dynamic)[threadIdx.x / kThreads];
  constexpr int kDepth = kStages<kDim>;
  const int warp = thread_of_team() / 32;
  uint64_t* flags = static_cast<uint64_t*>(p.workspace);
  float* part_o = reinterpret_cast<float*>(flags + flag_words(plan));
  float2* part_stats = reinterpret_cast<float2*>(part_o + plan.slots * plan.rows * kDim);

  allow_successor();
  bool waits = p.settled;
  if (!waits) wait_for_predecessor();
  const Share share = find_share(p, plan, shared.scratch);
  Walk walk(p, plan, share);
  Stream<T, kDim> stream(walk, warp);
#pragma unroll
  for (int i = 0; i < kDepth - 1; i++) {
    if (waits && !stream.is_settled(p, plan)) {
      wait_for_predecessor();
      waits = false;
    }
    stream.issue(p, plan, shared.tiles[warp][i]);
  }
  if (waits) wait_for_predecessor();
  int stage = 0;

  WarpRows<T, kDim> mine;
  BlockRows<T, kDim> all;
  bool ends_one = false;  // that an earlier block begins
  for (Segment s; walk.next(p, plan, s);) {
    mine.load(p, plan, s);
    all.begin(p, plan, s);
    const Parts parts(plan, share, s);
    const int run = plan.invariant ? s.cut : s.end - s.begin;
    for (int begin = s.begin; begin < s.end; begin += run) {
      const int end = min(begin + run, s.end);
      mine.clear();
      for (int tile = begin + warp; tile < end; tile += kWarps) {
        wait_copies<kDepth - 2>();
        __syncwarp();
        stream.issue(p, plan, shared.tiles[warp][stage == 0 ? kDepth - 1 : stage - 1]);
        mine.add(p, shared.tiles[warp][stage], (s.sequence.first_tile + tile) * kTile, s.sequence.length);
        stage = stage + 1 == kDepth ? 0 : stage + 1;
      }
      const int64_t row = s.whole() ? 0 : parts.slot(parts.at(begin)) * plan.rows;
      all.gather(shared, mine, s.whole() ? nullptr : part_o + row * kDim, part_stats + row);
    }
    if (s.whole()) {
      all.write(p, plan, s);
      continue;
    }
    if (thread_of_team() == 0) raise(flags + parts.slot(parts.at(s.begin)), p.tag);
    if (s.end == s.sequence.tiles) {
      if (thread_of_team() == 0) shared.ended = s;
      ends_one = true;
    }
  }
  if (!ends_one) return;
  // All blocks have their shares behind them by now, or soon: waiting earlier would put them in a queue.
  sync_team();
  const Segment s = shared.ended;
  const Parts parts(plan, share, s);
  for (int part = thread_of_team(); part < parts.count(); part += kThreads)
    if (parts.begins(part)) await(flags + parts.slot(part), p.tag);
  sync_team();
  all.begin(p, plan, s);
  all.collect(plan, parts, part_o, part_stats);
  all.write(p, plan, s);
}

}  // namespace cs336::paged
