// The backward's inner loop. With P = exp(scale Q K^T - lse), delta = rowsum(O dO) and dS = P (dO V^T - delta):
//     dV = P^T dO,   dK = scale dS^T Q,   dQ = scale dS K.
//
// A block owns 128 keys of one key head and walks the query tiles that see them, each for all query heads that share
// the keys (or some of them, where blocks would be too few; dK and dV are then parts, to be added up). Blocks that
// start together go down from the last tile side by side, and end one after the other where their keys are; those that
// start then go up, side by side, and end together. So what they read and add to stays in L2. A producer thread streams
// Q and dO; two consumer warpgroups own 64 keys each, with dK and dV in registers. They work on transposed scores (keys
// down, queries across): P^T and dS^T are then, where they are computed, register operands of the products for dV and
// dK. dS goes through shared memory too, where both halves of the keys meet for dQ = dS K, and two writer warps let the
// copy engine add dQ to sums in fp32.
//
// With D = 96 and 128 dQ has a warpgroup of its own, for which nobody waits:
//   a warpgroup of keys   P |      | dS | store dS |                 | P of the next tile
//   its products            | dP . dV ............ | dK . S of the next
//   the warpgroup of dQ     ... of the tile before | dQ | stage it | dQ | stage it |
// With D = 64, where exponentials and registers are scarce, each warpgroup of keys computes half of dQ:
//   a warpgroup   dS | store dS |          | stage dQ |  P of the next tile  |
//   its products  dV .......... | dK . dQ .| S of the next . dP of the next
#pragma once
#include "kernels/attention/mask.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/attention/tiles.cuh"

namespace cs336::attention {

using namespace hopper;

// The key tile that a block works on, as its producer announces it.
struct BwdWork {
  Sequence sequence;
  int key0;
  int kv_head;      // -1: there is no more work
  int head, place;  // its first query head, and the head of dK and dV
  int first, last;  // query tiles [first, last) see some of the keys
  int direction;    // of the walk over them: 1 up, -1 down

  __device__ __forceinline__ int first_tile() const { return direction > 0 ? first : last - 1; }
  __device__ __forceinline__ int steps(int heads) const { return (last - first) * heads; }
  __device__ __forceinline__ int tile(int step, int heads) const { return first_tile() + direction * (step / heads); }
  __device__ __forceinline__ int q_head(int step, int heads) const { return head + step % heads; }
};

template <typename T_, int kHeadDim_, int kQueries_, int kKeys_, Mask kMask_, bool kCap_>
struct BwdTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kQueries = kQueries_, kKeys = kKeys_;
  static constexpr Mask kMask = kMask_;
  static constexpr bool kCap = kCap_;
  static constexpr bool kDqApart = kHeadDim > 64;  // dQ by a warpgroup of its own
  static constexpr int kGroups = 2;                // consumer warpgroups, 64 keys each
  static constexpr int kStages = 2;                // query tiles in flight
  static constexpr int kThreads = 128 * (kGroups + (kDqApart ? 2 : 1));
  static constexpr int kProducerRegisters = kDqApart ? 24 : 40, kDqRegisters = 72;
  static constexpr int kConsumerRegisters = kDqApart ? 208 : 232;
  static constexpr int kPanels = num_panels(kHeadDim), kColumns = kPanels * kPanel;  // those past kHeadDim are zeros
  static constexpr int kQ = kQueries * kColumns, kQBytes = 2 * kQ;
  static constexpr int kK = kKeys * kColumns, kKBytes = 2 * kK;
  static constexpr int kRowFloats = 2 * kQueries;  // lse and delta of a query tile
  // dQ of a tile is computed in pieces of 64 rows and 64 columns, one per warpgroup, which divide the columns of a tile
  // of 64 queries, else the rows.
  static constexpr int kPiece = 64 * 64;
  static constexpr int kDqStages = kDqApart ? 2 : 1;  // tiles of dQ on their way out
  static constexpr bool kSplitColumns = kQueries == 64;
  static_assert(kKeys == 64 * kGroups && kQueries * kColumns == kGroups * kPiece);

  struct Shared {
    alignas(1024) T k[kK];
    alignas(1024) T v[kK];
    alignas(1024) T q[kStages][kQ];
    alignas(1024) T dout[kStages][kQ];
    alignas(1024) T ds[2][kQueries * kKeys];             // rows are queries; panel g holds the keys of warpgroup g
    alignas(1024) float dq[kDqStages][kGroups][kPiece];  // in the order of the registers
    alignas(1024) float rows[kStages][kRowFloats];
    int row0[kStages];  // of a query tile
    struct {
      int below, above;
    } masked[kGroups];  // tiles whose first row is outside need a mask
    uint64_t k_full, v_full, kv_empty;
    uint64_t q_full[kStages], dout_full[kStages], q_empty[kStages];
    uint64_t ds_full[2], ds_empty[2];
    uint64_t dq_full[kDqStages][kGroups], dq_empty[kDqStages][kGroups];
    uint64_t work_full[2], work_empty[2];
    BwdWork work[2];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // dynamic shared memory is aligned to less than 1024
};

struct BwdArgs {
  CUtensorMap q, k, v, dout, dk, dv;
  Sequences sequences;
  Window window;
  TileOrder order;     // of key tiles
  const float* rows;   // per query tile: -lse log2(e) of its rows (minus infinity: no weight), then delta
  float* dq;           // per query tile: two pieces; zero before, where there are no turns
  int* turns;          // two per query tile: how many key tiles have added to it, or to a piece; null: in any order
  int* counter;        // draws tiles; zero before the launch
  int q_heads, group;  // query heads, and how many share keys
  int heads;           // of them that one block walks
  int wave;            // key tiles whose blocks go the same way: down, up, down, ...
  int query_tiles;     // of one head: of a sequence, or of all packed ones
  float cap_factor;    // of the scores in tanh
  float scale;         // of dK
  float scale_log2;    // of the scores (with a cap: of the tanh) times log2(e)
};

// The place of a query tile among all tiles of all heads.
template <class Tile>
__device__ __forceinline__ int64_t query_tile(const BwdArgs& a, const Sequence& s, int head, int tile) {
  const int first = a.sequences.cu_q ? s.q_start / Tile::kQueries + s.index : 0;
  return (int64_t(a.sequences.cu_q ? 0 : s.index) * a.q_heads + head) * a.query_tiles + first + tile;
}

// Announces key tile number `index`, field by field: the producer has few registers.
template <class Tile>
__device__ __forceinline__ void announce(const BwdArgs& a, int index, BwdWork& w) {
  const TileOrder::Tile tile = a.order.tile<false>(index, a.q_heads / a.heads, Tile::kKeys);
  if (tile.rows.sequence < 0) return;
  w.place = tile.head, w.head = tile.head * a.heads, w.kv_head = tile.head * a.heads / a.group;
  w.key0 = tile.rows.row0, w.direction = w.key0 / Tile::kKeys / a.wave % 2 ? 1 : -1;
  w.sequence = a.sequences[tile.rows.sequence];
  const Sequence& s = w.sequence;
  const int last_key = min(w.key0 + Tile::kKeys, s.k_length) - 1;
  const QueryTiles tiles = tiles_that_see<Tile::kMask == Mask::kWindow, Tile::kMask != Mask::kNone>(
      w.key0, last_key, s.offset(), s.q_length, a.window.left, a.window.right, Tile::kQueries);
  w.first = tiles.first, w.last = tiles.last;
}

// How many key tiles add to a query tile before this one does: those with smaller keys.
template <class Tile>
__device__ __forceinline__ int turn_of(const BwdArgs& a, const BwdWork& w, int tile) {
  const int first_key = a.window.begin<Tile::kMask>(w.sequence, tile * Tile::kQueries);
  return w.key0 / Tile::kKeys - first_key / Tile::kKeys;
}

// ---- producer ----

template <class Tile>
__device__ __forceinline__ void load_rows(const CUtensorMap& map, typename Tile::T* to, int num_rows, uint64_t* full,
                                          int row, int head, const Rows& rows) {
#pragma unroll
  for (int p = 0; p < Tile::kPanels; p++)
    copy_in(&map, to + p * (num_rows * kPanel), full, p * kPanel, row + rows.shift, head, rows.c3, rows.c4);
}

template <class Tile>
__device__ __forceinline__ void bwd_produce(const BwdArgs& a, typename Tile::Shared& shared) {
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
    barrier_arrive_expect(&shared.k_full, Tile::kKBytes);
    load_rows<Tile>(a.k, shared.k, Tile::kKeys, &shared.k_full, w.key0, w.kv_head, a.sequences.k_rows(w.sequence));
    barrier_arrive_expect(&shared.v_full, Tile::kKBytes);
    load_rows<Tile>(a.v, shared.v, Tile::kKeys, &shared.v_full, w.key0, w.kv_head, a.sequences.k_rows(w.sequence));
#pragma unroll 1  // few registers
    for (int i = 0; i < w.steps(a.heads); i++, count++) {
      const int tile = w.tile(i, a.heads), head = w.q_head(i, a.heads), stage = count % Tile::kStages;
      const Rows rows = a.sequences.q_rows(w.sequence);
      barrier_wait(&shared.q_empty[stage], (count / Tile::kStages & 1) ^ 1);
      shared.row0[stage] = tile * Tile::kQueries;
      barrier_arrive_expect(&shared.q_full[stage], Tile::kQBytes + Tile::kRowFloats * 4);
      load_rows<Tile>(a.q, shared.q[stage], Tile::kQueries, &shared.q_full[stage], tile * Tile::kQueries, head, rows);
      bulk_in(shared.rows[stage], a.rows + query_tile<Tile>(a, w.sequence, head, tile) * Tile::kRowFloats,
              Tile::kRowFloats * 4, &shared.q_full[stage]);
      barrier_arrive_expect(&shared.dout_full[stage], Tile::kQBytes);
      load_rows<Tile>(a.dout, shared.dout[stage], Tile::kQueries, &shared.dout_full[stage], tile * Tile::kQueries, head,
                      rows);
    }
  }
}

// ---- writers: add what is staged of dQ ----

// For tiles of smaller keys of the same head. They were dealt before (TileOrder), and a block works on what it drew in
// the order in which it drew: so the first tile of all that is not done waits for nobody, however few blocks there are.
__device__ __forceinline__ void await_turn(const int* turns, int turn) {
  int done;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(done) : "l"(turns) : "memory");
  } while (done != turn);
  asm volatile("fence.proxy.async.global;" ::: "memory");  // what follows is written by the async proxy
}
__device__ __forceinline__ void pass_turn(int* turns) {
  asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.s32 [%0], 1;" ::"l"(turns) : "memory");
}

// One of two. Where two tiles are staged each takes every other tile, with both pieces, so that what one waits for (its
// turn, and that the sums are written before it passes the turn on) is hidden behind the other; else each has a piece.
template <class Tile>
__device__ __forceinline__ void bwd_write(const BwdArgs& a, typename Tile::Shared& shared, int writer) {
  constexpr bool kByTiles = Tile::kDqStages == 2;
  const int first_piece = kByTiles ? 0 : writer, last_piece = kByTiles ? Tile::kGroups - 1 : writer;
  int count = 0;  // query tiles done by both
  for (int round = 0;; round++) {
    const BwdWork& w = shared.work[round % 2];
    barrier_wait(&shared.work_full[round % 2], round / 2 & 1);
    if (w.kv_head < 0) break;
#pragma unroll 1  // few registers
    for (int i = 0; i < w.steps(a.heads); i++, count++) {
      if (kByTiles && count % 2 != writer) continue;
      const int tile = w.tile(i, a.heads), stage = count % Tile::kDqStages;
      const int64_t piece0 = query_tile<Tile>(a, w.sequence, w.q_head(i, a.heads), tile) * Tile::kGroups;
      const int turn = a.turns ? turn_of<Tile>(a, w, tile) : -1;
      if (turn > 0) await_turn(a.turns + piece0 + first_piece, turn);
#pragma unroll 1
      for (int piece = first_piece; piece <= last_piece; piece++) {
        barrier_wait(&shared.dq_full[stage][piece], count / Tile::kDqStages & 1);
        float* sums = a.dq + (piece0 + piece) * Tile::kPiece;
        if (turn == 0)
          bulk_out(sums, shared.dq[stage][piece], Tile::kPiece * 4);
        else
          bulk_add(sums, shared.dq[stage][piece], Tile::kPiece * 4);
        commit_out();
        wait_out_read();
        barrier_arrive(&shared.dq_empty[stage][piece]);
      }
      if (a.turns) wait_out(), pass_turn(a.turns + piece0 + first_piece);
    }
    barrier_arrive(&shared.work_empty[round % 2]);
  }
  wait_out();
}

// ---- dQ = dS K, in pieces ----

__device__ __forceinline__ void release(uint64_t* barrier) {  // one arrival per warp
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

template <class Tile>
__device__ __forceinline__ void start_dq(typename Tile::Shared& shared, float (&d)[32], int buffer, int piece) {
  using Product = Wgmma<typename Tile::T, 64>;
  const auto* queries = shared.ds[buffer] + (Tile::kSplitColumns ? 0 : piece * (64 * kPanel));
  const auto* keys = shared.k + (Tile::kSplitColumns ? piece * (Tile::kKeys * kPanel) : 0);
  const uint64_t x = opaque(tile_descriptor(queries, 0)), y = opaque(tile_descriptor(keys, Tile::kKeys * 128));
  wgmma_fence();
  Product::template ss_set<Along::kRows>(d, x, y);
#pragma unroll
  for (int k = 1; k < Tile::kKeys / 16; k++)
    Product::template ss_add<Along::kRows>(
        d, x + k / 4 * descriptor_step(Tile::kQueries * 128) + k % 4 * descriptor_step(32),
        y + k * descriptor_step(16 * 128));
  wgmma_commit();
}

// To where the writer takes it from, which hand_over then tells it; of query tile number `count`.
template <class Tile>
__device__ __forceinline__ void stage_dq(typename Tile::Shared& shared, const float (&dq)[32], int piece, int count) {
  const int stage = count % Tile::kDqStages;
  barrier_wait(&shared.dq_empty[stage][piece], (count / Tile::kDqStages & 1) ^ 1);
  float4* staged = reinterpret_cast<float4*>(shared.dq[stage][piece]) + threadIdx.x % 128;
#pragma unroll
  for (int j = 0; j < 8; j++) staged[j * 128] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
}
template <class Tile>
__device__ __forceinline__ void hand_over(typename Tile::Shared& shared, int piece, int count) {
  fence_async_proxy();
  release(&shared.dq_full[count % Tile::kDqStages][piece]);
}

// The warpgroup of dQ, where there is one.
template <class Tile>
__device__ __forceinline__ void bwd_multiply_queries(const BwdArgs& a, typename Tile::Shared& shared) {
  int count = 0;  // query tiles done
  for (int round = 0;; round++) {
    const BwdWork& w = shared.work[round % 2];
    barrier_wait(&shared.work_full[round % 2], round / 2 & 1);
    if (uniform(w.kv_head) < 0) break;
    for (int i = uniform(w.steps(a.heads)); i > 0; i--, count++) {
      const int buffer = count % 2;
      // Whoever stored dS has waited for K. A wait for K outside of the steps could miss it: while keys that no query
      // sees pass by, K of the tile after may come too, and this warp would wait for a phase that needs it to go on.
      barrier_wait(&shared.ds_full[buffer], count / 2 & 1);
#pragma unroll 1  // few registers
      for (int piece = 0; piece < Tile::kGroups; piece++) {
        float dq[32];
        start_dq<Tile>(shared, dq, buffer, piece);
        wgmma_wait<0>(dq);
        if (piece == Tile::kGroups - 1) release(&shared.ds_empty[buffer]);
        stage_dq<Tile>(shared, dq, piece, count);
        hand_over<Tile>(shared, piece, count);
      }
    }
    release(&shared.work_empty[round % 2]);
  }
}

// ---- consumer: one warpgroup and its registers ----

template <class Tile>
struct BwdConsumer {
  using T = typename Tile::T;
  static constexpr int kHeadDim = Tile::kHeadDim, kQueries = Tile::kQueries, kKeys = Tile::kKeys;
  static constexpr int kMeet = 1, kStore = 2;  // named barriers: of both warpgroups; one per warpgroup
  // Of descriptors: a panel of queries and of keys, 16 rows, a stage.
  static constexpr int kQPanel = descriptor_step(kQueries * 128), kKPanel = descriptor_step(kKeys * 128);
  static constexpr int kRows16 = descriptor_step(16 * 128), kStage = descriptor_step(Tile::kQBytes);
  static constexpr int kDsBytes = kQueries * kKeys * 2;

  const BwdArgs& a;
  typename Tile::Shared& shared;
  const int group;
  const uint32_t ds_address;  // where this lane's row of the matrices that it stores begins in its panel of dS

  float dk[kHeadDim / 2], dv[kHeadDim / 2];
  float s[kQueries / 2];         // S^T
  float dp[kQueries / 2];        // (dO V^T)^T
  uint32_t p[kQueries / 16][4];  // P^T, rounded
  int count = 0;                 // query tiles done

  __device__ __forceinline__ BwdConsumer(const BwdArgs& a, typename Tile::Shared& shared, int group)
      : a(a),
        shared(shared),
        group(group),
        ds_address(shared_address(shared.ds[0]) + group * (kQueries * 128) + (lane() / 16 * 8 + lane() % 8) * 128 +
                   ((2 * warp() + lane() / 8 % 2) ^ lane() % 8) * 16) {}

  // Computed where they are needed: registers are scarce.
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }
  __device__ __forceinline__ uint64_t keys(const T* tile) const {  // descriptor of the warpgroup's keys
    return tile_descriptor(tile + group * (64 * kPanel), 0);
  }
  __device__ __forceinline__ uint64_t queries(const T (&tiles)[Tile::kStages][Tile::kQ]) const {
    return tile_descriptor(tiles[0], kQueries * 128) + count % Tile::kStages * kStage;
  }

  // ---- products ----

  // D^T = A B^T, where A holds this warpgroup's keys and B the queries.
  __device__ __forceinline__ void start_scores(float (&d)[kQueries / 2], uint64_t keys, uint64_t queries) {
    using Product = Wgmma<T, kQueries>;
    const uint64_t x = opaque(keys), y = opaque(queries);
    wgmma_fence();
    Product::template ss_set<Along::kColumns>(d, x, y);
#pragma unroll
    for (int k = 1; k < kHeadDim / 16; k++)
      Product::template ss_add<Along::kColumns>(d, x + k / 4 * kKPanel + k % 4 * descriptor_step(32),
                                                y + k / 4 * kQPanel + k % 4 * descriptor_step(32));
    wgmma_commit();
  }

  // d += A B, where A (keys x queries) is in registers and B holds the queries.
  __device__ __forceinline__ void start_sum(float (&d)[kHeadDim / 2], const uint32_t (&x)[kQueries / 16][4],
                                            uint64_t queries) {
    const uint64_t y = opaque(queries);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kQueries / 16; k++) Wgmma<T, kHeadDim>::template rs_add<Along::kRows>(d, x[k], y + k * kRows16);
    wgmma_commit();
  }

  // ---- elements ----

  // P from the scores, with weight 0 where a query must not see a key.
  __device__ __forceinline__ void weigh(const BwdWork& w, int stage) {
    if constexpr (Tile::kCap) {
#pragma unroll
      for (int e = 0; e < kQueries / 2; e++) s[e] = soft_capped(s[e], a.cap_factor);
    }
    mask(w, shared.row0[stage]);
    const float2* lse = reinterpret_cast<const float2*>(shared.rows[stage]) + lane() % 4;
#pragma unroll
    for (int j = 0; j < kQueries / 8; j++) {
      const float2 x = lse[4 * j];
      float y[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        y[e] = exp2_approx(fmaf(s[4 * j + e], a.scale_log2, e % 2 ? x.y : x.x));
      }
      p[j / 2][j % 2 * 2] = pack<T>(y[0], y[1]);
      p[j / 2][j % 2 * 2 + 1] = pack<T>(y[2], y[3]);
    }
  }

  // P of a cap, where s holds tanh of the scores, times the derivative of tanh: all that dS needs of it.
  __device__ __forceinline__ void multiply_by_slope() {
#pragma unroll
    for (int e = 0; e < kQueries / 2; e += 2) {
      uint32_t& pair = p[e / 8][e % 8 / 2];
      const float2 weight = unpack<T>(pair);  // 0 where masked
      pair = pack<T>(weight.x * fmaxf(1.f - s[e] * s[e], 0.f), weight.y * fmaxf(1.f - s[e + 1] * s[e + 1], 0.f));
    }
  }

  __device__ __forceinline__ void mask(const BwdWork& w, int row0) {
    const Sequence& q = w.sequence;
    const int first_key = w.key0 + 64 * group;
    const auto [below, above] = shared.masked[group];
    if (row0 >= below && row0 <= above) return;
    mask_transposed_scores<Tile::kMask>(s, a.window, q, first_key + 16 * warp() + lane() / 4, row0 + lane() % 4 * 2);
  }

  // Which query tiles hide some of the warpgroup's keys from some of their rows.
  __device__ __forceinline__ void find_masked(const BwdWork& w) {
    const Sequence& q = w.sequence;
    const int first_key = w.key0 + 64 * group, last_key = first_key + 63;
    const int below = last_key >= q.k_length       ? kFar
                      : Tile::kMask == Mask::kNone ? 0
                                                   : last_key - q.offset() - a.window.right;
    const int above = Tile::kMask == Mask::kWindow ? first_key - q.offset() + a.window.left - kQueries + 1 : kFar;
    if (threadIdx.x % 128 == 0) shared.masked[group] = {below, above};
    named_sync(kStore + group, 128);
  }

  // dS^T = P^T (dP^T - delta), rounded. P comes once more from its rounded pairs: registers are scarce.
  __device__ __forceinline__ void score_gradients(uint32_t (&ds)[kQueries / 16][4], int stage) {
    const float2* delta = reinterpret_cast<const float2*>(shared.rows[stage] + kQueries) + lane() % 4;
#pragma unroll
    for (int j = 0; j < kQueries / 8; j++) {
      const float2 x = delta[4 * j];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int e = 4 * j + 2 * r;
        const float2 weight = unpack<T>(p[j / 2][j % 2 * 2 + r]);
        ds[j / 2][j % 2 * 2 + r] = pack<T>(weight.x * (dp[e] - x.x), weight.y * (dp[e + 1] - x.y));
      }
    }
  }

  // ---- one query tile of one head ----

  __device__ __forceinline__ void start_s() {
    barrier_wait(&shared.q_full[count % Tile::kStages], count / Tile::kStages & 1);
    start_scores(s, keys(shared.k), queries(shared.q));
  }
  __device__ __forceinline__ void await_dout() {
    barrier_wait(&shared.dout_full[count % Tile::kStages], count / Tile::kStages & 1);
  }
  __device__ __forceinline__ void start_dp() {
    await_dout();
    start_scores(dp, keys(shared.v), queries(shared.dout));
  }

  // dS to shared memory, where both halves of the keys meet.
  __device__ __forceinline__ void store_ds(const uint32_t (&ds)[kQueries / 16][4], int buffer) {
#pragma unroll
    for (int k = 0; k < kQueries / 16; k++)
      store_matrices_transposed(ds_address + buffer * kDsBytes + k * (16 * 128), ds[k]);
    fence_async_proxy();
    release(&shared.ds_full[buffer]);
  }

  // Where another warpgroup computes dQ. The tile's S is there; ends with that of the next one.
  template <bool kNext>
  __device__ __forceinline__ void step_beside_dq(const BwdWork& w) {
    const int stage = count % Tile::kStages, buffer = count % 2;
    uint32_t ds[kQueries / 16][4];
    weigh(w, stage);
    if constexpr (Tile::kCap) {
      await_dout();
      start_sum(dv, p, queries(shared.dout));
      wgmma_wait<0>(dv);
      multiply_by_slope();
      start_dp();
      wgmma_wait<0>(dp);
    } else {
      start_dp();
      start_sum(dv, p, queries(shared.dout));
      wgmma_wait<1>(dp);
    }
    score_gradients(ds, stage);
    barrier_wait(&shared.ds_empty[buffer], (count / 2 & 1) ^ 1);
    store_ds(ds, buffer);
    start_sum(dk, ds, queries(shared.q));
    count++;
    wgmma_wait<1>(dv);
    if constexpr (kNext) start_s();
    wgmma_wait<0>(s);
    changes_here(dv), changes_here(dk);
    release(&shared.q_empty[stage]);
  }

  // With this warpgroup's piece of dQ. The tile's P and dP are there; ends with those of the next one. dS has two
  // buffers: once both warpgroups have stored a tile, the products that read the other buffer are over.
  template <bool kNext>
  __device__ __forceinline__ void step_with_dq(const BwdWork& w) {
    const int stage = count % Tile::kStages, buffer = count % 2;
    float dq[32];
    uint32_t ds[kQueries / 16][4];
    start_sum(dv, p, queries(shared.dout));
    score_gradients(ds, stage);
    store_ds(ds, buffer);
    start_sum(dk, ds, queries(shared.q));
    wgmma_wait<1>(dv);
    barrier_wait(&shared.ds_full[buffer], count / 2 & 1);
    start_dq<Tile>(shared, dq, buffer, group);
    wgmma_wait<0>(dq);
    release(&shared.q_empty[stage]);
    stage_dq<Tile>(shared, dq, group, count++);
    if constexpr (kNext) start_s(), start_dp();
    hand_over<Tile>(shared, group, count - 1);
    if constexpr (kNext) finish_scores(w);
  }

  // P of the scores that were started, while the product for dP goes on.
  __device__ __forceinline__ void finish_scores(const BwdWork& w) {
    wgmma_wait<1>(s);
    weigh(w, count % Tile::kStages);
    wgmma_wait<0>(dp);
  }

  __device__ __forceinline__ void walk(const BwdWork& w) {
    const int steps = uniform(w.steps(a.heads));
    find_masked(w);
    start_s();
    if constexpr (Tile::kDqApart) {
      wgmma_wait<0>(s);
      for (int i = steps; i > 1; i--) step_beside_dq<true>(w);
      step_beside_dq<false>(w);
    } else {
      start_dp();
      finish_scores(w);
      for (int i = steps; i > 1; i--) step_with_dq<true>(w);
      step_with_dq<false>(w);
    }
  }

  // ---- the end of a key tile ----

  // Rounds a gradient of 128 keys, through the shared memory of what it is the gradient of.
  __device__ __forceinline__ void store(const float (&x)[kHeadDim / 2], float factor, T* tile, const CUtensorMap& map,
                                        const BwdWork& w) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; c += 2) {  // two columns of 8 x 8 matrices
      const int row = 64 * group + 16 * warp() + lane() % 8 + lane() / 8 % 2 * 8, chunk = c + lane() / 16;
      const uint32_t address =
          shared_address(tile) + chunk / 8 * (kKeys * 128) + row * 128 + (chunk % 8 ^ lane() % 8) * 16;
      const float* y = x + 4 * c;
      store_matrices(address, {pack<T>(y[0] * factor, y[1] * factor), pack<T>(y[2] * factor, y[3] * factor),
                               pack<T>(y[4] * factor, y[5] * factor), pack<T>(y[6] * factor, y[7] * factor)});
    }
    fence_async_proxy();
    named_sync(kStore + group, 128);
    const int row0 = w.key0 + 64 * group;
    if (threadIdx.x % 128 == 0 && row0 < w.sequence.k_length) {
      const Rows rows = a.sequences.k_rows(w.sequence);
      for (int c = 0; c < Tile::kPanels; c++)
        copy_out(&map, tile + c * (kKeys * kPanel) + group * (64 * kPanel), c * kPanel, row0 + rows.shift, w.place,
                 rows.c3, rows.c4);
      commit_out();
    }
  }

  __device__ __forceinline__ void run() {
    for (int round = 0;; round++) {
      barrier_wait(&shared.work_full[round % 2], round / 2 & 1);
      const BwdWork& w = shared.work[round % 2];
      if (uniform(w.kv_head) < 0) break;
#pragma unroll
      for (int e = 0; e < kHeadDim / 2; e++) dk[e] = dv[e] = 0.f;
      barrier_wait(&shared.k_full, round & 1);
      barrier_wait(&shared.v_full, round & 1);
      const bool seen = uniform(w.last - w.first) > 0;
      if (seen) walk(w);
      changes_here(dk), changes_here(dv);
      named_sync(kMeet, 256);  // no other consumer reads K and V any more
      store(dv, 1.f, shared.v, a.dv, w);
      if (Tile::kDqApart && seen) barrier_wait(&shared.ds_empty[(count - 1) % 2], (count - 1) / 2 & 1);  // nor does dQ
      store(dk, a.scale, shared.k, a.dk, w);
      if (threadIdx.x % 128 == 0) {
        wait_out_read();
        barrier_arrive(&shared.kv_empty);
      }
      release(&shared.work_empty[round % 2]);
    }
  }
};

}  // namespace cs336::attention
