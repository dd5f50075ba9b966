// The backward of wide heads, second half: dQ. With P = exp(scale Q K^T - lse) and delta = rowsum(O dO):
//     dQ = scale dS K,   dS = P (dO V^T - delta).
//
// A block owns 128 query rows of one head, 64 for each of its two consumer warpgroups, and walks the key blocks that
// they see, as the forward does. P and dS stay in registers, where dS is the left operand of the product for dQ; that
// starts behind the next block's S, so that P is worked on beside it and dP, and while one warpgroup turns its scores
// into dS the tensor cores run the products of the other:
//   warpgroup 1          | dS |               | P of the next block | dS
//     its products  . dP |    | S of the next . dQ . dP of the next |
#pragma once
#include "kernels/attention/attention_bwd_mainloop.cuh"
#include "kernels/attention/attention_fwd_mainloop.cuh"

namespace cs336::attention {

template <typename T_, int kHeadDim_, int kValueDim_, Mask kMask_>
struct BwdQueriesTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kValueDim = kValueDim_;
  static constexpr int kGroups = 2, kRows = 64 * kGroups, kKeys = 64;
  static constexpr Mask kMask = kMask_;
  static constexpr int kThreads = 384, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kQ = 64 * kHeadDim, kQBytes = 2 * kQ;   // of a warpgroup's rows of Q; a block of K is as large
  static constexpr int kV = 64 * kValueDim, kVBytes = 2 * kV;  // of dO; a block of V
  static constexpr int kStages = kHeadDim > 192 ? 2 : 4;       // blocks of K in flight
  static constexpr int kVStages = kValueDim > 128 ? 1 : 2;     // and of V: its product is over before K's second
  static_assert(kKeys == 64 && kHeadDim % kPanel == 0 && kValueDim % kPanel == 0);

  struct Shared {
    alignas(1024) T q[kGroups][kQ];
    alignas(1024) T dout[kGroups][kV];
    alignas(1024) T k[kStages][kQ];
    alignas(1024) T v[kVStages][kV];
    uint64_t q_full[kGroups], q_empty[kGroups];
    uint64_t k_full[kStages], k_empty[kStages], v_full[kVStages], v_empty[kVStages];
    uint64_t work_full[2], work_empty[2];
    FwdWork work[2];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // dynamic shared memory is aligned to less than 1024
};

struct BwdQueriesArgs {
  CUtensorMap q, k, v, dout, dq;
  Sequences sequences;
  Window window;
  TileOrder order;     // of tiles of query rows
  const float* rows;   // per 64 rows: -lse log2(e) (minus infinity: no weight), then delta
  int* counter;        // draws tiles; zero before the launch
  int q_heads, group;  // query heads, and how many share keys
  int row_tiles;       // of 64 rows, of one head: of a sequence, or of all packed ones
  float scale;         // of dQ
  float scale_log2;    // of the scores, times log2(e)
};

template <class Tile>
__device__ __forceinline__ void bwd_queries_produce(const BwdQueriesArgs& a, typename Tile::Shared& shared) {
  const auto load = [](const CUtensorMap& map, typename Tile::T* to, int panels, uint64_t* full, int row, int head,
                       const Rows& rows) {
    for (int p = 0; p < panels; p++)
      copy_in(&map, to + p * (64 * kPanel), full, p * kPanel, row + rows.shift, head, rows.c3, rows.c4);
  };
  constexpr int kQPanels = num_panels(Tile::kHeadDim), kVPanels = num_panels(Tile::kValueDim);
  prefetch_map(&a.q), prefetch_map(&a.k), prefetch_map(&a.v), prefetch_map(&a.dout), prefetch_map(&a.dq);
  int count = 0;  // blocks of K and V asked for
  for (int round = 0;; round++) {
    FwdWork& w = shared.work[round % 2];
    barrier_wait(&shared.work_empty[round % 2], (round / 2 & 1) ^ 1);
    w.head = -1;
    while (w.head < 0) {  // packed sequences have gaps between their tiles
      const int index = atomicAdd(a.counter, 1);
      if (index >= a.order.count()) break;
      const TileOrder::Tile tile = a.order.tile<true>(index, a.q_heads, Tile::kRows);
      if (tile.rows.sequence < 0) continue;
      w.sequence = a.sequences[tile.rows.sequence], w.row0 = tile.rows.row0;
      w.head = tile.head, w.kv_head = tile.head / a.group;
      w.blocks = visible_blocks<Tile::kMask, Tile::kKeys>(a.window, w.sequence, w.row0, Tile::kRows);
    }
    barrier_arrive(&shared.work_full[round % 2]);
    if (w.head < 0) break;

#pragma unroll 1  // few registers
    for (int g = 0; g < Tile::kGroups; g++) {
      const Rows rows = a.sequences.q_rows(w.sequence);
      barrier_wait(&shared.q_empty[g], (round & 1) ^ 1);
      barrier_arrive_expect(&shared.q_full[g], Tile::kQBytes + Tile::kVBytes);
      load(a.q, shared.q[g], kQPanels, &shared.q_full[g], w.row0 + 64 * g, w.head, rows);
      load(a.dout, shared.dout[g], kVPanels, &shared.q_full[g], w.row0 + 64 * g, w.head, rows);
    }
#pragma unroll 1
    for (int j = w.blocks.last - 1; j >= w.blocks.first; j--, count++) {
      const Rows rows = a.sequences.k_rows(w.sequence);
      const int k = count % Tile::kStages, v = count % Tile::kVStages;
      barrier_wait(&shared.k_empty[k], (count / Tile::kStages & 1) ^ 1);
      barrier_arrive_expect(&shared.k_full[k], Tile::kQBytes);
      load(a.k, shared.k[k], kQPanels, &shared.k_full[k], j * Tile::kKeys, w.kv_head, rows);
      barrier_wait(&shared.v_empty[v], (count / Tile::kVStages & 1) ^ 1);
      barrier_arrive_expect(&shared.v_full[v], Tile::kVBytes);
      load(a.v, shared.v[v], kVPanels, &shared.v_full[v], j * Tile::kKeys, w.kv_head, rows);
    }
  }
}

template <class Tile>
struct BwdQueriesConsumer {
  using T = typename Tile::T;
  static constexpr int kKeys = Tile::kKeys, kHeadDim = Tile::kHeadDim;
  static constexpr int kStore = 1;  // named barriers, one per warpgroup
  static constexpr int kPanelStep = descriptor_step(64 * 128);

  const BwdQueriesArgs& a;
  typename Tile::Shared& shared;
  const int group;

  float dq[kHeadDim / 2];
  float s[kKeys / 2], dp[kKeys / 2];
  uint32_t ds[kKeys / 16][4];
  float lse[2], delta[2];    // of this thread's rows, lse as in BwdQueriesArgs::rows
  int round = 0, count = 0;  // tiles and blocks done

  __device__ __forceinline__ BwdQueriesConsumer(const BwdQueriesArgs& a, typename Tile::Shared& shared, int group)
      : a(a), shared(shared), group(group) {}

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }

  // D = A B^T over kFeatures, where A holds this warpgroup's rows and B the keys.
  template <int kFeatures>
  __device__ __forceinline__ void start_scores(float (&d)[kKeys / 2], const T* rows, const T* keys) {
    using Product = Wgmma<T, kKeys>;
    const uint64_t x = opaque(tile_descriptor(rows, 0)), y = opaque(tile_descriptor(keys, 0));
    wgmma_fence();
    Product::template ss_set<Along::kColumns>(d, x, y);
#pragma unroll
    for (int k = 1; k < kFeatures / 16; k++)
      Product::template ss_add<Along::kColumns>(d, x + k / 4 * kPanelStep + k % 4 * descriptor_step(32),
                                                y + k / 4 * kPanelStep + k % 4 * descriptor_step(32));
    wgmma_commit();
  }

  // Of block number `block`.
  __device__ __forceinline__ void start_s(int block) {
    const int k = block % Tile::kStages;
    barrier_wait(&shared.k_full[k], block / Tile::kStages & 1);
    start_scores<kHeadDim>(s, shared.q[group], shared.k[k]);
  }
  __device__ __forceinline__ void start_dp(int block) {
    const int v = block % Tile::kVStages;
    barrier_wait(&shared.v_full[v], block / Tile::kVStages & 1);
    start_scores<Tile::kValueDim>(dp, shared.dout[group], shared.v[v]);
  }
  __device__ __forceinline__ void start_dq(int block) {
    const uint64_t y = opaque(tile_descriptor(shared.k[block % Tile::kStages], kKeys * 128));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; k++)
      Wgmma<T, kHeadDim>::template rs_add<Along::kRows>(dq, ds[k], y + k * descriptor_step(16 * 128));
    wgmma_commit();
  }

  // A block that none of the warpgroup's rows sees passes through its hands.
  __device__ __forceinline__ void skip_block() {
    const int k = count % Tile::kStages, v = count % Tile::kVStages;
    barrier_wait(&shared.k_full[k], count / Tile::kStages & 1);
    release(&shared.k_empty[k]);
    barrier_wait(&shared.v_full[v], count / Tile::kVStages & 1);
    release(&shared.v_empty[v]);
    count++;
  }

  // P from the scores of block j.
  __device__ __forceinline__ void weigh(const FwdWork& w, int row, int j, bool masked) {
    if (masked) mask_scores<Tile::kMask>(s, a.window, w.sequence, row, j * kKeys + lane() % 4 * 2);
#pragma unroll
    for (int e = 0; e < kKeys / 2; e++) s[e] = exp2_approx(fmaf(s[e], a.scale_log2, lse[e / 2 % 2]));
    changes_here(s);
    // Over already, but the compiler moves no wait for products up across it.
    barrier_wait(&shared.q_full[group], round & 1);
  }

  // dS of block number `count`.
  __device__ __forceinline__ void score_gradients() {
    wgmma_wait<0>(dp);
    release(&shared.v_empty[count % Tile::kVStages]);
#pragma unroll
    for (int e = 0; e < kKeys / 2; e += 2) {
      const float d = delta[e / 2 % 2];
      ds[e / 8][e / 2 % 4] = pack<T>(s[e] * (dp[e] - d), s[e + 1] * (dp[e + 1] - d));
    }
  }

  __device__ __forceinline__ void read_rows(const FwdWork& w, int first_row) {
    const bool inside = first_row < w.sequence.q_length;
    const int first = a.sequences.cu_q ? w.sequence.q_start / 64 + w.sequence.index : 0;
    const int64_t head = int64_t(a.sequences.cu_q ? 0 : w.sequence.index) * a.q_heads + w.head;
    const float* rows = a.rows + (head * a.row_tiles + first + first_row / 64) * 128 + 16 * warp() + lane() / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      lse[i] = inside ? rows[8 * i] : -INFINITY;
      delta[i] = inside ? rows[64 + 8 * i] : 0.f;
    }
  }

  __device__ __forceinline__ void walk(const FwdWork& w, int first_row, int row) {
    const bool inside = first_row < w.sequence.q_length;
    const Blocks own = inside ? visible_blocks<Tile::kMask, kKeys>(a.window, w.sequence, first_row, 64)
                              : Blocks{w.blocks.first, w.blocks.first + 1};
    const int last_row = min(first_row + 64, w.sequence.q_length) - 1;
    const int first = uniform(own.first), last = uniform(own.last);
    // Blocks that every row sees in full.
    const int first_unmasked = uniform((a.window.begin<Tile::kMask>(w.sequence, last_row) + kKeys - 1) / kKeys);
    const int last_unmasked = uniform(a.window.end<Tile::kMask>(w.sequence, first_row) / kKeys);
    for (int i = uniform(w.blocks.last); i > last; i--) skip_block();
    const auto masked = [&](int j) { return j >= last_unmasked || j < first_unmasked; };
    start_s(count);
    start_dp(count);
    wgmma_wait<1>(s);
    int j = last - 1;
    weigh(w, row, j, masked(j));
    score_gradients();
    while (--j >= first) {
      start_s(count + 1);
      start_dq(count);
      start_dp(count + 1);
      wgmma_wait<2>(s);
      weigh(w, row, j, masked(j));
      wgmma_wait<1>(dq);
      release(&shared.k_empty[count++ % Tile::kStages]);
      score_gradients();
    }
    start_dq(count);
    wgmma_wait<0>(dq);
    release(&shared.k_empty[count++ % Tile::kStages]);
    for (int i = uniform(w.blocks.first); i < first; i++) skip_block();
  }

  // Rounds dQ, in the place of Q, and lets the copy engine write it; rows past the end are outside the map.
  __device__ __forceinline__ void store(const FwdWork& w, int first_row) {
    T* out = shared.q[group];
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; c += 2) {  // two columns of 8 x 8 matrices
      const int row = 16 * warp() + lane() % 8 + lane() / 8 % 2 * 8, chunk = c + lane() / 16;
      const float *x = dq + 4 * c, f = a.scale;
      store_matrices(shared_address(out) + chunk / 8 * (64 * 128) + row * 128 + (chunk % 8 ^ lane() % 8) * 16,
                     {pack<T>(x[0] * f, x[1] * f), pack<T>(x[2] * f, x[3] * f), pack<T>(x[4] * f, x[5] * f),
                      pack<T>(x[6] * f, x[7] * f)});
    }
    fence_async_proxy();
    named_sync(kStore + group, 128);
    if (threadIdx.x % 128 == 0) {
      const Rows rows = a.sequences.q_rows(w.sequence);
      if (first_row < w.sequence.q_length)
        for (int p = 0; p < num_panels(kHeadDim); p++)
          copy_out(&a.dq, out + p * (64 * kPanel), p * kPanel, first_row + rows.shift, w.head, rows.c3, rows.c4);
      commit_out();
      wait_out_read();
      barrier_arrive(&shared.q_empty[group]);
    }
  }

  __device__ __forceinline__ void run() {
    for (;; round++) {
      barrier_wait(&shared.work_full[round % 2], round / 2 & 1);
      const FwdWork& w = shared.work[round % 2];
      if (uniform(w.head) < 0) break;
      const int first_row = w.row0 + 64 * group;
      read_rows(w, first_row);
#pragma unroll
      for (int e = 0; e < kHeadDim / 2; e++) dq[e] = 0.f;
      barrier_wait(&shared.q_full[group], round & 1);
      walk(w, first_row, first_row + 16 * warp() + lane() / 4);
      changes_here(dq);
      store(w, first_row);
      release(&shared.work_empty[round % 2]);
    }
  }
};

}  // namespace cs336::attention
