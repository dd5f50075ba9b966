// The forward's inner loop. One block per multiprocessor stays for the whole launch. Its first warpgroup is the
// producer, of which one thread draws tiles of query rows and streams Q, K and V into shared memory. Each other
// warpgroup owns 64 rows of the tile and walks the key blocks from the last one back. For block j it starts
//     S = Q K_j^T   and, behind it,   O += P V_{j+1}   of the block before,
// and turns S into the next P. The warpgroups take turns at starting their products: while one works on its
// exponentials, the tensor cores run the products of the others.
//
//   warpgroup 1   | S3  O4 | exp 3           | S2  O3 | exp 2           |
//   warpgroup 2            | S3  O4 | exp 3           | S2  O3 | exp 2  |
//   warpgroup 3   | exp 4           | S3  O4 | exp 3           | S2  O3 |
//   tensor cores  | 1      | 2      | 3      | 1      | 2      | 3      |
#pragma once
#include "common/async.cuh"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/attention/tiles.cuh"

namespace cs336::attention {

using namespace hopper;

// One tile of query rows of one head, as the producer announces it.
struct FwdWork {
  Sequence sequence;
  int row0;
  int head, kv_head;  // head -1: there is no more work
  Blocks blocks;
};

template <typename T_, int kHeadDim_, int kValueDim_, int kGroups_, int kKeys_, int kStages_, int kQStages_,
          Mask kMask_, bool kCap_, bool kInTurns_ = true, bool kDrawn_ = true, int kTeams_ = 1, int kHeldSteps_ = 0>
struct FwdTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kValueDim = kValueDim_;
  static constexpr int kTeams = kTeams_;      // that a block works on tiles with, each one of its own
  static constexpr int kGroups = kGroups_;    // consumer warpgroups of a team
  static constexpr int kKeys = kKeys_;        // of a block
  static constexpr int kStages = kStages_;    // blocks of K, and of V, in flight
  static constexpr int kQStages = kQStages_;  // tiles of Q in flight
  static constexpr Mask kMask = kMask_;
  static constexpr bool kCap = kCap_;
  static constexpr bool kInTurns = kInTurns_;  // whether warpgroups take turns at starting products
  static constexpr bool kDrawn = kDrawn_;      // whether tiles are drawn; else, equally long, they are dealt in advance
  static constexpr int kHeldSteps = kHeldSteps_;  // of 16 features of Q, which registers hold through a tile
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kAllGroups = kTeams * kGroups;
  static constexpr int kThreads = 128 * (kAllGroups + 1);
  static constexpr int kProducerRegisters = kAllGroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kAllGroups == 2 ? 232 : kAllGroups == 3 ? 160 : 112;
  // Tiles are panels of 64 columns, one behind the other; elements of one, and bytes.
  static constexpr int kQ = 64 * kPanel * num_panels(kHeadDim), kQBytes = 2 * kQ;  // of one warpgroup
  static constexpr int kK = kKeys * kPanel * num_panels(kHeadDim), kKBytes = 2 * kK;
  static constexpr int kV = kKeys * kPanel * num_panels(kValueDim), kVBytes = 2 * kV;
  static constexpr int kO = 64 * kPanel * num_panels(kValueDim);
  // The output leaves through shared memory: its own where there is room, else Q's.
  static constexpr bool kOwnOutput =
      kAllGroups * (kQStages * kQBytes + 2 * kO) + kTeams * kStages * (kKBytes + kVBytes) + 2048 <= 227 * 1024;
  static_assert(kTeams == 1 || !kInTurns);
  static_assert(kOwnOutput || (kO <= kQ && kQStages == 1));

  struct Shared {  // of a team
    alignas(1024) T q[kQStages][kGroups][kQ];
    alignas(1024) T k[kStages][kK];
    alignas(1024) T v[kStages][kV];
    alignas(1024) T o[kOwnOutput ? kGroups : 1][kOwnOutput ? kO : 8];
    uint64_t q_full[kQStages][kGroups], q_empty[kQStages][kGroups];
    uint64_t k_full[kStages], k_empty[kStages];
    uint64_t v_full[kStages], v_empty[kStages];
    uint64_t work_full[2], work_empty[2];
    FwdWork work[2];
  };
  static constexpr int kSharedBytes = kTeams * sizeof(Shared) + 1024;  // dynamic: aligned to less than 1024
  static_assert(kSharedBytes <= 227 * 1024);
};

struct FwdArgs {
  CUtensorMap q, k, v, o;
  Sequences sequences;
  Window window;
  TileOrder order;
  float* lse;          // (batch, q heads, q tokens)
  int* counter;        // draws tiles; zero before the launch
  int q_heads, group;  // query heads, and how many share keys
  float cap_factor;    // of the scores in tanh
  float scale;         // of the scores; with a cap: of the tanh
  float scale_log2;    // times log2(e)
};

template <class Tile>
__device__ __forceinline__ FwdWork fwd_work(const FwdArgs& a, int index) {
  const TileOrder::Tile tile = a.order.tile<true>(index, a.q_heads, Tile::kRows);
  if (tile.rows.sequence < 0) return {.head = -1};
  FwdWork w{a.sequences[tile.rows.sequence], tile.rows.row0, tile.head, tile.head / a.group, {}};
  w.blocks = visible_blocks<Tile::kMask, Tile::kKeys>(a.window, w.sequence, w.row0, Tile::kRows);
  return w;
}

// The first of a warpgroup's rows. The last rows see the last keys, and the warpgroup whose turn is first begins there.
template <class Tile>
__device__ __forceinline__ int first_row_of(const FwdWork& w, int group) {
  return w.row0 + 64 * (Tile::kGroups - 1 - group);
}

// A position in a ring of stages.
template <int kStages>
struct Ring {
  int count = 0, stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() { count++, stage = count % kStages, parity = count / kStages & 1; }
};

// Waits for an empty stage and fills it with the rows from `row` on: one copy for each panel of columns.
template <class Tile, int kStageBytes, int kPanels>
__device__ __forceinline__ void load_block(const CUtensorMap& map, void* ring, uint64_t* full, uint64_t* empty,
                                           int count, int row, int head, const Rows& rows) {
  const int stage = count % Tile::kStages;
  barrier_wait(&empty[stage], (count / Tile::kStages & 1) ^ 1);
  barrier_arrive_expect(&full[stage], kStageBytes);
#pragma unroll
  for (int p = 0; p < kPanels; p++)
    copy_in(&map, static_cast<char*>(ring) + stage * kStageBytes + p * (Tile::kKeys * 128), &full[stage], p * kPanel,
            row + rows.shift, head, rows.c3, rows.c4);
}

template <class Tile>
__device__ __forceinline__ void fwd_produce(const FwdArgs& a, typename Tile::Shared& shared, int team) {
  constexpr int kKPanels = num_panels(Tile::kHeadDim), kVPanels = num_panels(Tile::kValueDim);
  prefetch_map(&a.q), prefetch_map(&a.k), prefetch_map(&a.v), prefetch_map(&a.o);
  // For the whole block: all that it writes follows from what is loaded here.
  wait_for_predecessor(), allow_successor();
  const int teams = gridDim.x * Tile::kTeams;
  int count = 0;  // blocks of K and V asked for
  int tile = blockIdx.x + team * gridDim.x;
  for (int round = 0;; round++) {
    FwdWork& w = shared.work[round % 2];
    barrier_wait(&shared.work_empty[round % 2], (round / 2 & 1) ^ 1);
    int drawn;  // the tile after this one; nobody waits for it before this one's copies are under way
    w.head = -1;
    while (tile < a.order.count()) {
      drawn = Tile::kDrawn ? atomicAdd(a.counter, 1) : tile;
      w = fwd_work<Tile>(a, tile);
      if (w.head >= 0) break;
      tile = teams + drawn;  // packed sequences have gaps between their tiles
    }
    barrier_arrive(&shared.work_full[round % 2]);
    if (w.head < 0) break;

    const auto load_k = [&](int count, int j) {
      load_block<Tile, Tile::kKBytes, kKPanels>(a.k, shared.k, shared.k_full, shared.k_empty, count, j * Tile::kKeys,
                                                w.kv_head, a.sequences.k_rows(w.sequence));
    };
    const auto load_v = [&](int count, int j) {
      load_block<Tile, Tile::kVBytes, kVPanels>(a.v, shared.v, shared.v_full, shared.v_empty, count, j * Tile::kKeys,
                                                w.kv_head, a.sequences.k_rows(w.sequence));
    };
#pragma unroll 1
    for (int g = 0; g < Tile::kGroups; g++) {
      const Rows q_rows = a.sequences.q_rows(w.sequence);
      const int stage = round % Tile::kQStages;
      barrier_wait(&shared.q_empty[stage][g], (round / Tile::kQStages & 1) ^ 1);
      barrier_arrive_expect(&shared.q_full[stage][g], Tile::kQBytes);
      for (int p = 0; p < kKPanels; p++)
        copy_in(&a.q, shared.q[stage][g] + p * (64 * kPanel), &shared.q_full[stage][g], p * kPanel,
                first_row_of<Tile>(w, g) + q_rows.shift, w.head, q_rows.c3, q_rows.c4);
      if (g == 0) load_k(count, w.blocks.last - 1);
    }
    int j = w.blocks.last - 1;
#pragma unroll 1  // the producer has few registers
    for (const int first = w.blocks.first; j > first; j--, count++) load_k(count + 1, j - 1), load_v(count, j);
    load_v(count++, j);
    tile = teams + drawn;
  }
}

// One warpgroup and its registers.
template <class Tile>
struct FwdConsumer {
  using T = typename Tile::T;
  using Products = Wgmma<T, Tile::kKeys>;
  static constexpr int kKeys = Tile::kKeys, kValueDim = Tile::kValueDim;
  static constexpr int kTurn = 1, kStore = kTurn + Tile::kGroups;  // named barriers, one per warpgroup each
  static_assert(kStore + Tile::kAllGroups <= 16, "a block has 16 named barriers");

  const FwdArgs& a;
  typename Tile::Shared& shared;
  const int team, group, thread, lane, warp;
  const uint64_t q_tile, k_tile, v_tile;  // descriptors

  uint32_t held[std::max(Tile::kHeldSteps, 1)][4];
  float o[kValueDim / 2], s[kKeys / 2];
  uint32_t p[kKeys / 16][4];
  Softmax<kKeys / 2> softmax;
  Ring<Tile::kStages> ring;
  int q_stage;

  __device__ __forceinline__ FwdConsumer(const FwdArgs& a, typename Tile::Shared& shared, int team, int group)
      : a(a),
        shared(shared),
        team(team),
        group(group),
        thread(threadIdx.x % 128),
        lane(threadIdx.x % 32),
        warp(threadIdx.x % 128 / 32),
        q_tile(tile_descriptor(shared.q[0][group], 0)),
        k_tile(tile_descriptor(shared.k[0], 0)),
        v_tile(tile_descriptor(shared.v[0], kKeys * 128)) {}

  // ---- products ----

  // A step of 16 columns is 32 bytes, of 64 columns a panel; of 16 rows 16 * 128 bytes.
  __device__ __forceinline__ void start_scores(int stage) {
    const uint64_t k = k_tile + stage * descriptor_step(Tile::kKBytes);
    const uint64_t q = q_tile + q_stage * descriptor_step(Tile::kGroups * Tile::kQBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Tile::kHeadDim / 16; i++) {
      const uint64_t q_step = q + i / 4 * descriptor_step(64 * 128) + i % 4 * descriptor_step(32);
      const uint64_t k_step = k + i / 4 * descriptor_step(kKeys * 128) + i % 4 * descriptor_step(32);
      if (i < Tile::kHeldSteps)
        i ? Products::template rs_add<Along::kColumns>(s, held[i], k_step)
          : Products::template rs_set<Along::kColumns>(s, held[i], k_step);
      else
        i ? Products::template ss_add<Along::kColumns>(s, q_step, k_step)
          : Products::template ss_set<Along::kColumns>(s, q_step, k_step);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void start_output(int stage) {
    constexpr int kRows16 = descriptor_step(16 * 128);
    const uint64_t v = v_tile + stage * descriptor_step(Tile::kVBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; i++) Wgmma<T, kValueDim>::template rs_add<Along::kRows>(o, p[i], v + i * kRows16);
    wgmma_commit();
  }

  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 16; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) p[i][e] = pack<T>(s[8 * i + 2 * e], s[8 * i + 2 * e + 1]);
  }

  // ---- hand-over ----

  __device__ __forceinline__ void release(uint64_t* barrier) {  // one arrival per warp
    if (lane == 0) barrier_arrive(barrier);
  }
  __device__ __forceinline__ void await_turn() {
    if constexpr (Tile::kInTurns) named_sync(kTurn + group, 256);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (Tile::kInTurns) named_arrive(kTurn + (group + 1 == Tile::kGroups ? 0 : group + 1), 256);
  }

  // ---- the walk over key blocks ----

  __device__ __forceinline__ void cap_scores() {
    if constexpr (Tile::kCap) {
#pragma unroll
      for (int e = 0; e < kKeys / 2; e++) s[e] = soft_capped(s[e], a.cap_factor);
    }
  }

  __device__ __forceinline__ void first_block(const FwdWork& w, int row, int j, bool masked) {
    barrier_wait(&shared.k_full[ring.stage], ring.parity);
    start_scores(ring.stage);
    wgmma_wait<0>(s);
    release(&shared.k_empty[ring.stage]);
    cap_scores();
    if (masked) mask_scores<Tile::kMask>(s, a.window, w.sequence, row, j * kKeys + lane % 4 * 2);
    softmax.begin(s, a.scale_log2);
    round_weights();
#pragma unroll
    for (int e = 0; e < kValueDim / 2; e++) o[e] = 0.f;
  }

  template <bool kMasked>
  __device__ __forceinline__ void next_block(const FwdWork& w, int row, int j) {
    const int v_stage = ring.stage;
    const uint32_t v_parity = ring.parity;
    ring.advance();
    barrier_wait(&shared.k_full[ring.stage], ring.parity);
    await_turn();
    start_scores(ring.stage);
    barrier_wait(&shared.v_full[v_stage], v_parity);
    start_output(v_stage);
    pass_turn();
    wgmma_wait<1>(s);
    release(&shared.k_empty[ring.stage]);
    cap_scores();
    if constexpr (kMasked) mask_scores<Tile::kMask>(s, a.window, w.sequence, row, j * kKeys + lane % 4 * 2);
    float fade[2];
    const bool moved = softmax.update(s, a.scale_log2, fade);
    // The compiler moves this wait up, to before most of the exponentials. Holding it here did not run faster: the
    // other warpgroups keep the tensor cores busy.
    wgmma_wait<0>(o);
    release(&shared.v_empty[v_stage]);
    round_weights();
    if (__any_sync(~0u, moved)) {
#pragma unroll
      for (int e = 0; e < kValueDim / 2; e++) o[e] *= fade[e / 2 % 2];
    }
  }

  // A block that none of the warpgroup's rows sees passes through its hands.
  __device__ __forceinline__ void skip_block() {
    barrier_wait(&shared.k_full[ring.stage], ring.parity);
    release(&shared.k_empty[ring.stage]);
    barrier_wait(&shared.v_full[ring.stage], ring.parity);
    release(&shared.v_empty[ring.stage]);
    await_turn();
    pass_turn();
    ring.advance();
  }

  // Blocks [first, last) of the warpgroup's rows that every row sees in full.
  __device__ __forceinline__ Blocks unmasked_blocks(const FwdWork& w, int first_row) {
    const int last_row = min(first_row + 64, w.sequence.q_length) - 1;
    return {(a.window.begin<Tile::kMask>(w.sequence, last_row) + kKeys - 1) / kKeys,
            a.window.end<Tile::kMask>(w.sequence, first_row) / kKeys};
  }

  __device__ __forceinline__ void walk(const FwdWork& w, int first_row, int row) {
    const Blocks own = first_row < w.sequence.q_length
                           ? visible_blocks<Tile::kMask, kKeys>(a.window, w.sequence, first_row, 64)
                           : Blocks{w.blocks.first, w.blocks.first + 1};
    const Blocks unmasked = unmasked_blocks(w, first_row);
    const int first = uniform(own.first), last = uniform(own.last);
    const int first_unmasked = uniform(max(own.first, unmasked.first)), last_unmasked = uniform(unmasked.last);
    for (int i = uniform(w.blocks.last); i > last; i--) skip_block();
    int j = last - 1;
    first_block(w, row, j, j >= last_unmasked || j < first_unmasked);
    j--;
    if constexpr (Tile::kMask != Mask::kNone)  // else only the last block can need a mask
      for (; j >= first && j >= last_unmasked; j--) next_block<true>(w, row, j);
    for (; j >= first_unmasked; j--) next_block<false>(w, row, j);
    if constexpr (Tile::kMask == Mask::kWindow)
      for (; j >= first; j--) next_block<true>(w, row, j);
    if (Tile::kOwnOutput) release(&shared.q_empty[q_stage][group]);
    barrier_wait(&shared.v_full[ring.stage], ring.parity);
    start_output(ring.stage);
  }

  // ---- the end of a tile ----

  // The log-sum-exp of the rows, and in softmax.sum what the output is to be multiplied by; O's last product still
  // runs.
  __device__ __forceinline__ void finish_rows(const FwdWork& w, int row) {
    float* lse = a.lse + a.sequences.row_floats(w.sequence, w.head, a.q_heads);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float sum = sum_of_row(softmax.sum[i]);
      const bool nothing_seen = sum == 0.f;
      if (lane % 4 == 0 && row + 8 * i < w.sequence.q_length)
        lse[row + 8 * i] = nothing_seen ? -INFINITY : softmax.top[i] * a.scale + logf(sum);
      softmax.sum[i] = nothing_seen ? 0.f : 1.f / sum;
    }
  }

  // Rounds O and lets the copy engine write it; rows past the end of the sequence are outside the map.
  __device__ __forceinline__ void store_output(const FwdWork& w, int first_row) {
    T* out = Tile::kOwnOutput ? shared.o[group] : shared.q[0][group];
    if (Tile::kOwnOutput) {
      if (thread == 0) wait_out_read();  // of the tile before
      named_sync(kStore + team * Tile::kGroups + group, 128);
    }
#pragma unroll
    for (int c = 0; c < kValueDim / 8; c += 2) {  // two columns of 8 x 8 matrices
      const int matrix_row = 16 * warp + lane % 8 + lane / 8 % 2 * 8, chunk = c + lane / 16;
      const uint32_t address =
          shared_address(out) + chunk / 8 * (64 * 128) + matrix_row * 128 + (chunk % 8 ^ lane % 8) * 16;
      const float *x = o + 4 * c, *f = softmax.sum;
      store_matrices(address, {pack<T>(x[0] * f[0], x[1] * f[0]), pack<T>(x[2] * f[1], x[3] * f[1]),
                               pack<T>(x[4] * f[0], x[5] * f[0]), pack<T>(x[6] * f[1], x[7] * f[1])});
    }
    fence_async_proxy();
    named_sync(kStore + team * Tile::kGroups + group, 128);
    if (thread == 0) {
      const Rows rows = a.sequences.q_rows(w.sequence);
      if (first_row < w.sequence.q_length)
        for (int p = 0; p < num_panels(kValueDim); p++)
          copy_out(&a.o, out + p * (64 * kPanel), p * kPanel, first_row + rows.shift, w.head, rows.c3, rows.c4);
      commit_out();
      if (!Tile::kOwnOutput) {
        wait_out_read();
        barrier_arrive(&shared.q_empty[0][group]);
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (group == Tile::kGroups - 1) pass_turn();  // the first turn is warpgroup 0's
    for (int round = 0;; round++) {
      barrier_wait(&shared.work_full[round % 2], round / 2 & 1);
      const FwdWork& w = shared.work[round % 2];
      if (uniform(w.head) < 0) break;
      const int first_row = first_row_of<Tile>(w, group), row = first_row + 16 * warp + lane / 4;
      q_stage = round % Tile::kQStages;
      barrier_wait(&shared.q_full[q_stage][group], round / Tile::kQStages & 1);
#pragma unroll
      for (int i = 0; i < Tile::kHeldSteps; i++) read_left(held[i], shared.q[q_stage][group], warp, lane, i);
      walk(w, first_row, row);
      const int v_stage = ring.stage;
      finish_rows(w, row);
      wgmma_wait<0>(o);
      release(&shared.v_empty[v_stage]);
      store_output(w, first_row);
      ring.advance();
      skip_rest(w, first_row);
      __syncwarp();
      release(&shared.work_empty[round % 2]);
    }
    if (thread == 0) wait_out_read();  // shared memory must outlive the copies that read it
  }

  // Blocks before the first one that the warpgroup's rows see.
  __device__ __forceinline__ void skip_rest(const FwdWork& w, int first_row) {
    if constexpr (Tile::kMask == Mask::kWindow) {
      const int first = first_row < w.sequence.q_length
                            ? visible_blocks<Tile::kMask, kKeys>(a.window, w.sequence, first_row, 64).first
                            : w.blocks.first;
      for (int i = uniform(first - w.blocks.first); i > 0; i--) skip_block();
    }
  }
};

}  // namespace cs336::attention
