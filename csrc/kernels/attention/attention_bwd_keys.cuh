// The backward of wide heads, first half: dK and dV. dQ, whose registers do not fit beside theirs, has a kernel of its
// own (attention_bwd_queries.cuh), which computes the scores again: 7 products for 5, but no sums in memory.
//
// A block owns 64 keys of one key head and walks the query tiles that see them, in the order of the other backward
// (attention_bwd_mainloop.cuh). Of its two consumer warpgroups one has S and dV, the other dP and dK, over all
// features. Scores are transposed (keys down, queries across), so P^T and dS^T are register operands of the products
// for dV and dK where they are computed; P goes from one warpgroup to the other as it lies in registers. The products
// of the next tile's scores start before those for the gradients, beside which they are then worked on:
//   warpgroup of dV   P | store P |           | P of the next tile
//     its products              | S of the next . dV |
//   warpgroup of dK       read P | dS |            | dS of the next
//     its products                    | dP of the next . dK |
#pragma once
#include "kernels/attention/attention_bwd_mainloop.cuh"

namespace cs336::attention {

template <typename T_, int kHeadDim_, int kValueDim_, Mask kMask_>
struct BwdKeysTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kValueDim = kValueDim_;
  static constexpr int kQueries = 64, kKeys = 64;
  static constexpr Mask kMask = kMask_;
  static constexpr int kStages = kHeadDim > 192 ? 2 : 4;  // query tiles in flight
  static constexpr int kThreads = 384, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kK = kKeys * kHeadDim, kKBytes = 2 * kK;   // of a tile of K, and of Q
  static constexpr int kV = kKeys * kValueDim, kVBytes = 2 * kV;  // of V, and of dO
  static constexpr int kRowBytes = kQueries * 4;                  // lse, or delta, of a query tile
  static_assert(kQueries == kKeys && kHeadDim % kPanel == 0 && kValueDim % kPanel == 0);

  struct Shared {
    alignas(1024) T k[kK];
    alignas(1024) T v[kV];
    alignas(1024) T q[kStages][kK];
    alignas(1024) T dout[kStages][kV];
    alignas(1024) uint4 p[2][kQueries / 16][128];  // P of a thread, as its registers hold it
    alignas(16) float lse[kStages][kQueries];
    alignas(16) float delta[kStages][kQueries];
    int row0[kStages];  // of a query tile
    uint64_t kv_full, kv_empty;
    uint64_t q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
    uint64_t p_full[2], p_empty[2];
    uint64_t work_full[2], work_empty[2];
    BwdWork work[2];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // dynamic shared memory is aligned to less than 1024
};

template <class Tile>
__device__ __forceinline__ void bwd_keys_produce(const BwdArgs& a, typename Tile::Shared& shared) {
  constexpr int kRows = 64;  // of any tile
  const auto load = [](const CUtensorMap& map, typename Tile::T* to, int panels, uint64_t* full, int row, int head,
                       const Rows& rows) {
    for (int p = 0; p < panels; p++)
      copy_in(&map, to + p * (kRows * kPanel), full, p * kPanel, row + rows.shift, head, rows.c3, rows.c4);
  };
  prefetch_map(&a.q), prefetch_map(&a.k), prefetch_map(&a.v), prefetch_map(&a.dout);
  prefetch_map(&a.dk), prefetch_map(&a.dv);
  int count = 0;  // query tiles loaded
  for (int round = 0;; round++) {
    BwdWork& w = shared.work[round % 2];
    barrier_wait(&shared.work_empty[round % 2], (round / 2 & 1) ^ 1);
    w.kv_head = -1;
    while (w.kv_head < 0) {  // packed sequences have gaps between their tiles
      const int index = atomicAdd(a.counter, 1);
      if (index >= a.order.count()) break;
      announce<Tile>(a, index, w);
    }
    barrier_arrive(&shared.work_full[round % 2]);
    if (w.kv_head < 0) break;

    barrier_wait(&shared.kv_empty, (round & 1) ^ 1);
    barrier_arrive_expect(&shared.kv_full, Tile::kKBytes + Tile::kVBytes);
    const Rows k_rows = a.sequences.k_rows(w.sequence);
    load(a.k, shared.k, num_panels(Tile::kHeadDim), &shared.kv_full, w.key0, w.kv_head, k_rows);
    load(a.v, shared.v, num_panels(Tile::kValueDim), &shared.kv_full, w.key0, w.kv_head, k_rows);
#pragma unroll 1  // few registers
    for (int i = 0; i < w.steps(a.heads); i++, count++) {
      const int tile = w.tile(i, a.heads), head = w.q_head(i, a.heads), stage = count % Tile::kStages;
      const uint32_t parity = (count / Tile::kStages & 1) ^ 1;
      const Rows q_rows = a.sequences.q_rows(w.sequence);
      const float* rows = a.rows + query_tile<Tile>(a, w.sequence, head, tile) * (2 * Tile::kQueries);
      barrier_wait(&shared.q_empty[stage], parity);
      shared.row0[stage] = tile * Tile::kQueries;
      barrier_arrive_expect(&shared.q_full[stage], Tile::kKBytes + Tile::kRowBytes);
      load(a.q, shared.q[stage], num_panels(Tile::kHeadDim), &shared.q_full[stage], tile * Tile::kQueries, head,
           q_rows);
      bulk_in(shared.lse[stage], rows, Tile::kRowBytes, &shared.q_full[stage]);
      barrier_wait(&shared.dout_empty[stage], parity);
      barrier_arrive_expect(&shared.dout_full[stage], Tile::kVBytes + Tile::kRowBytes);
      load(a.dout, shared.dout[stage], num_panels(Tile::kValueDim), &shared.dout_full[stage], tile * Tile::kQueries,
           head, q_rows);
      bulk_in(shared.delta[stage], rows + Tile::kQueries, Tile::kRowBytes, &shared.dout_full[stage]);
    }
  }
}

// One warpgroup: kOfValues has S, P and dV, the other dP, dS and dK.
template <class Tile, bool kOfValues>
struct BwdKeysConsumer {
  using T = typename Tile::T;
  static constexpr int kQueries = Tile::kQueries, kKeys = Tile::kKeys;
  static constexpr int kIn = kOfValues ? Tile::kHeadDim : Tile::kValueDim;   // features that scores sum over
  static constexpr int kOut = kOfValues ? Tile::kValueDim : Tile::kHeadDim;  // features of the gradient
  static constexpr int kMeet = 1, kStore = 2;                                // named barriers: of both; one each
  static constexpr int kPanelStep = descriptor_step(64 * 128);
  // Whether there are registers for the keys, as left operand of the scores: a third less of shared memory to read.
  static constexpr bool kOwnInRegisters = kOut / 2 + kIn / 4 <= 128;
  // Whether the next scores start before the product for the gradient; with few tiles in flight their queries are late.
  static constexpr bool kScoresFirst = Tile::kStages > 2;

  const BwdArgs& a;
  typename Tile::Shared& shared;
  // Of what the scores are products, keys and queries; and of which queries the gradient is a sum.
  T *const own, *const scored, *const summed;
  uint64_t *const scored_full, *const scored_empty, *const summed_full, *const summed_empty;

  float sum[kOut / 2];           // dV or dK
  float s[kQueries / 2];         // S^T or (dO V^T)^T
  uint32_t x[kQueries / 16][4];  // P^T or dS^T, rounded
  uint32_t left[kOwnInRegisters ? kIn / 16 : 1][4];
  int count = 0;  // query tiles done

  __device__ __forceinline__ BwdKeysConsumer(const BwdArgs& a, typename Tile::Shared& shared)
      : a(a),
        shared(shared),
        own(kOfValues ? shared.k : shared.v),
        scored(kOfValues ? shared.q[0] : shared.dout[0]),
        summed(kOfValues ? shared.dout[0] : shared.q[0]),
        scored_full(kOfValues ? shared.q_full : shared.dout_full),
        scored_empty(kOfValues ? shared.q_empty : shared.dout_empty),
        summed_full(kOfValues ? shared.dout_full : shared.q_full),
        summed_empty(kOfValues ? shared.dout_empty : shared.q_empty) {}

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }

  // 16 features of the keys after the other, as wgmma takes 64 rows from registers.
  __device__ __forceinline__ void read_own() {
    if constexpr (kOwnInRegisters) {
#pragma unroll
      for (int k = 0; k < kIn / 16; k++) read_left(left[k], own, warp(), lane(), k);
    }
  }

  // Of query tile number `tile`.
  __device__ __forceinline__ void start_scores(int tile) {
    using Product = Wgmma<T, kQueries>;
    const int stage = tile % Tile::kStages;
    barrier_wait(&scored_full[stage], tile / Tile::kStages & 1);
    const uint64_t x = opaque(tile_descriptor(own, 0));
    const uint64_t y = opaque(tile_descriptor(scored, 0) + stage * descriptor_step(2 * kQueries * kIn));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kIn / 16; k++) {
      const int step = k / 4 * kPanelStep + k % 4 * descriptor_step(32);
      if constexpr (kOwnInRegisters)
        k ? Product::template rs_add<Along::kColumns>(s, left[k], y + step)
          : Product::template rs_set<Along::kColumns>(s, left[k], y);
      else
        k ? Product::template ss_add<Along::kColumns>(s, x + step, y + step)
          : Product::template ss_set<Along::kColumns>(s, x, y);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void start_sum(int tile) {
    const int stage = tile % Tile::kStages;
    barrier_wait(&summed_full[stage], tile / Tile::kStages & 1);
    const uint64_t y = opaque(tile_descriptor(summed, kQueries * 128) + stage * descriptor_step(2 * kQueries * kOut));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kQueries / 16; k++)
      Wgmma<T, kOut>::template rs_add<Along::kRows>(sum, x[k], y + k * descriptor_step(16 * 128));
    wgmma_commit();
  }

  // P from the scores of query tile `tile`.
  __device__ __forceinline__ void weigh(const BwdWork& w, int tile, int first_masked, int last_masked) {
    const int stage = tile % Tile::kStages, row0 = shared.row0[stage];
    if (row0 < first_masked || row0 > last_masked)
      mask_transposed_scores<Tile::kMask>(s, a.window, w.sequence, w.key0 + 16 * warp() + lane() / 4,
                                          row0 + lane() % 4 * 2);
    const float2* lse = reinterpret_cast<const float2*>(shared.lse[stage]) + lane() % 4;
#pragma unroll
    for (int j = 0; j < kQueries / 8; j++) {
      const float2 y = lse[4 * j];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        s[4 * j + 2 * r] = exp2_approx(fmaf(s[4 * j + 2 * r], a.scale_log2, y.x));
        s[4 * j + 2 * r + 1] = exp2_approx(fmaf(s[4 * j + 2 * r + 1], a.scale_log2, y.y));
      }
    }
  }

  // dS^T = P^T (dP^T - delta).
  __device__ __forceinline__ void score_gradients(int tile) {
    const float2* delta = reinterpret_cast<const float2*>(shared.delta[tile % Tile::kStages]) + lane() % 4;
    barrier_wait(&shared.p_full[tile % 2], tile / 2 & 1);
#pragma unroll
    for (int k = 0; k < kQueries / 16; k++) {
      const uint4 p = shared.p[tile % 2][k][threadIdx.x % 128];
      const uint32_t weights[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {  // 8 x 8 matrices: queries 16 k + 8 (e / 2), keys + 8 (e % 2)
        const float2 weight = unpack<T>(weights[e]), d = delta[4 * (2 * k + e / 2)];
        float* y = s + 8 * k + 2 * e;
        y[0] = weight.x * (y[0] - d.x), y[1] = weight.y * (y[1] - d.y);
      }
    }
    release(&shared.p_empty[tile % 2]);
  }

  // The scores of query tile `tile`, which are there, become P or dS; x may still be read.
  __device__ __forceinline__ void turn_scores(const BwdWork& w, int tile, int first_masked, int last_masked) {
    if constexpr (kOfValues)
      weigh(w, tile, first_masked, last_masked);
    else
      score_gradients(tile);
    changes_here(s);
    release(&scored_empty[tile % Tile::kStages]);
    // The compiler moves no wait for products up across a wait for a barrier.
    if constexpr (kOfValues) barrier_wait(&shared.p_empty[tile % 2], (tile / 2 & 1) ^ 1);
  }

  // And are rounded; P goes over to the other warpgroup.
  __device__ __forceinline__ void round_scores(int tile) {
#pragma unroll
    for (int k = 0; k < kQueries / 16; k++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[k][e] = pack<T>(s[8 * k + 2 * e], s[8 * k + 2 * e + 1]);
    if constexpr (kOfValues) {
#pragma unroll
      for (int k = 0; k < kQueries / 16; k++)
        shared.p[tile % 2][k][threadIdx.x % 128] = {x[k][0], x[k][1], x[k][2], x[k][3]};
      release(&shared.p_full[tile % 2]);
    }
  }

  __device__ __forceinline__ void walk(const BwdWork& w) {
    const Sequence& q = w.sequence;
    const int last_key = w.key0 + kKeys - 1;
    // Query tiles whose first row is outside of these hide some of the keys from some of their rows.
    const int below = last_key >= q.k_length       ? kFar
                      : Tile::kMask == Mask::kNone ? 0
                                                   : last_key - q.offset() - a.window.right;
    const int above = Tile::kMask == Mask::kWindow ? w.key0 - q.offset() + a.window.left - kQueries + 1 : kFar;
    read_own();
    start_scores(count);
    wgmma_wait<0>(s);
    turn_scores(w, count, below, above);
    round_scores(count);
    for (int i = uniform(w.steps(a.heads)); i > 1; i--) {
      if constexpr (kScoresFirst) {
        start_scores(count + 1);
        start_sum(count);
        wgmma_wait<1>(s);
        turn_scores(w, count + 1, below, above);
        wgmma_wait<0>(sum);
        release(&summed_empty[count % Tile::kStages]);
      } else {
        start_sum(count);
        start_scores(count + 1);
        wgmma_wait<1>(sum);
        release(&summed_empty[count % Tile::kStages]);
        wgmma_wait<0>(s);
        turn_scores(w, count + 1, below, above);
      }
      round_scores(++count);
    }
    start_sum(count);
    wgmma_wait<0>(sum);
    release(&summed_empty[count++ % Tile::kStages]);
  }

  // The gradient, rounded, through the shared memory of what it is the gradient of.
  __device__ __forceinline__ void store(const BwdWork& w) {
    constexpr int kBarrier = kStore + kOfValues;
    const float factor = kOfValues ? 1.f : a.scale;
    T* tile = kOfValues ? shared.v : shared.k;
#pragma unroll
    for (int c = 0; c < kOut / 8; c += 2) {  // two columns of 8 x 8 matrices
      const int row = 16 * warp() + lane() % 8 + lane() / 8 % 2 * 8, chunk = c + lane() / 16;
      const float* y = sum + 4 * c;
      store_matrices(shared_address(tile) + chunk / 8 * (64 * 128) + row * 128 + (chunk % 8 ^ lane() % 8) * 16,
                     {pack<T>(y[0] * factor, y[1] * factor), pack<T>(y[2] * factor, y[3] * factor),
                      pack<T>(y[4] * factor, y[5] * factor), pack<T>(y[6] * factor, y[7] * factor)});
    }
    fence_async_proxy();
    named_sync(kBarrier, 128);
    if (threadIdx.x % 128 == 0) {
      const Rows rows = a.sequences.k_rows(w.sequence);
      for (int p = 0; p < num_panels(kOut); p++)
        copy_out(kOfValues ? &a.dv : &a.dk, tile + p * (64 * kPanel), p * kPanel, w.key0 + rows.shift, w.place, rows.c3,
                 rows.c4);
      commit_out();
      wait_out_read();
      barrier_arrive(&shared.kv_empty);
    }
  }

  __device__ __forceinline__ void run() {
    for (int round = 0;; round++) {
      barrier_wait(&shared.work_full[round % 2], round / 2 & 1);
      const BwdWork& w = shared.work[round % 2];
      if (uniform(w.kv_head) < 0) break;
#pragma unroll
      for (int e = 0; e < kOut / 2; e++) sum[e] = 0.f;
      barrier_wait(&shared.kv_full, round & 1);
      if (uniform(w.last - w.first) > 0) walk(w);
      changes_here(sum);
      named_sync(kMeet, 256);  // the other warpgroup reads K and V no more
      store(w);
      release(&shared.work_empty[round % 2]);
    }
  }
};

}  // namespace cs336::attention
