// y = x w^T + b for many rows of x, as y^T = w x^T: a warpgroup turns 64 rows of weights into x's dtype in registers,
// which wgmma takes as A; x is B, from shared memory.
//
//   y^T (64 rows of weights, kCols rows of x) += w (64, 16) x^T (16, kCols)             wgmma, fp32 sums
//
// One block per multiprocessor stays for the whole launch. Its first warpgroup is the producer, of which one thread
// streams 128 features of the block's rows of weights and of x at a time through a ring; each of the others owns 64
// rows of weights, which it converts while the tensor cores multiply what others have.
//
// The copy engine lays weights under its swizzle, so that the eight rows that a warp reads at once are in different
// banks: two neighbours of a row and the two eight features behind them, as A wants them, are two loads of 16 bits
// (int8, fp8). Of int4 the four lanes of a row read the same 16 bytes, and each takes its byte of each word.
//
// Weights are multiplied as they are kept, less their zero, which is exact; sums of a group are scaled when it ends.
//
// The `split` blocks of a cluster share the features of a tile. Their sums meet in shared memory: each block adds up
// every split-th row of x, in one order. So there is no workspace, and the bits are always the same.
#pragma once
#include <algorithm>

#include "common/async.cuh"
#include "common/hopper.cuh"
#include "kernels/linear_few_rows/weights.cuh"
#include "kernels/linear_many_rows/linear_many_rows.h"
#include "kernels/linear_many_rows/linear_many_rows_plan.h"

namespace cs336::many_rows {

using namespace hopper;
using cuda::LinearFewRowsParams;
using cuda::WeightFormat;
using few_rows::Scale;

template <typename T_, WeightFormat kFormat_, bool kZeros_, int kCols_, int kGroups_>
struct Tile {
  using T = T_;
  static constexpr WeightFormat kFormat = kFormat_;
  static constexpr bool kZeros = kZeros_;
  static constexpr int kCols = kCols_;        // rows of x
  static constexpr int kGroups = kGroups_;    // consumer warpgroups
  static constexpr int kRows = 64 * kGroups;  // of weights
  static constexpr int kThreads = 128 * (kGroups + 1), kWarps = 4 * kGroups;
  static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kGroups == 2 ? 232 : 112;
  static_assert(kGroups == 2 || kGroups == 4);
  static constexpr int kRowBytes = kFormat == WeightFormat::kInt4 ? 64 : 128;  // of weights, in a step
  static constexpr int kPanel = kCols * 64;                                    // elements of x: 64 features
  static constexpr int kWeightBytes = kRows * kRowBytes, kXBytes = 2 * kPanel * 2;
  static constexpr int kPitch = kRows + 4;  // floats: lanes that write sums of four rows of x are in different banks
  static constexpr int kPartialBytes = kCols * kPitch * 4;
  static constexpr int kStages = std::min(8, (225 * 1024 - kPartialBytes) / (kWeightBytes + kXBytes));
  static_assert(kStages >= 2);

  struct Shared {
    alignas(1024) T x[kStages][2 * kPanel];
    alignas(1024) uint8_t weights[kStages][kWeightBytes];
    alignas(16) float partial[kCols * kPitch];
    uint64_t full[kStages], empty[kStages];
    uint64_t partials_full[kGroups], partials_empty[kGroups];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // dynamic: aligned to less than 1024
  static_assert(kSharedBytes <= 227 * 1024);
};

struct Args {
  CUtensorMap x, weight;
  const void* scales;
  const int16_t* zeros;
  const void* bias;
  void* y;
  int M, N, group, groups;  // features that share a scale, and such groups in a row
  int steps, split;
  int64_t tiles, tiles_of_x;
  Dtype scale_dtype;
  bool constant;
};

// What a block of a cluster does of each of its tiles.
struct Share {
  const Steps steps;
  const int64_t first_tile, stride;  // and how far it is from one tile to the next

  __device__ __forceinline__ Share(const Args& a)
      : steps(steps_of(static_cast<int>(cluster_rank()), a.split, a.steps)),
        first_tile(blockIdx.x / a.split),
        stride(gridDim.x / a.split) {}
};

template <class Tile>
__device__ __forceinline__ void produce(const Args& a, typename Tile::Shared& shared) {
  prefetch_map(&a.x), prefetch_map(&a.weight);
  allow_successor();
  if (!a.constant) wait_for_predecessor();
  const Share share(a);
  const auto copy_weights = [&](int64_t tile, int step, int stage) {
    barrier_arrive_expect(&shared.full[stage], Tile::kWeightBytes + Tile::kXBytes);
    copy_in(&a.weight, shared.weights[stage], &shared.full[stage], step * Tile::kRowBytes,
            static_cast<int>(tile / a.tiles_of_x) * Tile::kRows, 0, 0, 0);
  };
  int ahead = 0;  // steps of the first tile whose weights are asked for before x may be read
  if (a.constant) {
    for (; ahead < min(Tile::kStages, share.steps.last - share.steps.first); ahead++)
      copy_weights(share.first_tile, share.steps.first + ahead, ahead);
    wait_for_predecessor();
  }
  int stage = 0, count = 0;
  uint32_t parity = 1;
  for (int64_t tile = share.first_tile; tile < a.tiles; tile += share.stride) {
    const int row = static_cast<int>(tile % a.tiles_of_x) * Tile::kCols;
#pragma unroll 1
    for (int step = share.steps.first; step < share.steps.last; step++, count++) {
      if (count >= ahead) {
        barrier_wait(&shared.empty[stage], parity);
        copy_weights(tile, step, stage);
      }
#pragma unroll
      for (int p = 0; p < 2; p++)
        copy_in(&a.x, shared.x[stage] + p * Tile::kPanel, &shared.full[stage], step * kStepFeatures + p * 64, row, 0, 0,
                0);
      if (++stage == Tile::kStages) stage = 0, parity ^= 1;
    }
  }
}

// The two weights of a byte of int4: `select` takes that byte of a word for __byte_perm, above it zeros.
template <typename T>
__device__ __forceinline__ uint32_t pair_of_int4(uint32_t word, uint32_t select) {
  const uint32_t byte = __byte_perm(word, 0, select);
  const uint32_t bits =
      few_rows::masked(byte * 0x1001, few_rows::twice(0xf), few_rows::twice(few_rows::kHalf<T> ? 0x6400 : 0x4300));
  return few_rows::minus<T>(bits, few_rows::twice(few_rows::kHalf<T> ? 0x6408 : 0x4308));  // 1024 or 128, and 8
}

// One warpgroup and its registers.
template <class Tile>
struct Consumer {
  using T = typename Tile::T;
  using Products = Wgmma<T, Tile::kCols>;
  using Sums = float[Tile::kCols / 2];
  static constexpr int kBatch = 4;  // products of 16 features between two waits; a step has two batches
  using Fragments = uint32_t[kBatch][4];

  const Args& a;
  typename Tile::Shared& shared;
  const Share share;
  const int warpgroup, thread, lane;
  const int row;  // of the tile's rows of weights: the first of two, 8 apart
  const uint64_t x_tile;
  const uint32_t own;  // where in a stage a lane's weights begin, under the swizzle of its row

  Sums sums, part;
  int stage = 0;
  uint32_t parity = 0;
  int group, left;   // the group that is added up in part, and its features to come
  uint32_t grid[2];  // of the first group of a row, which scales and zeros have alike
  Scale next_scale[2];
  float scale[2];
  int next_zero[2];
  uint32_t zero[2];

  __device__ __forceinline__ Consumer(const Args& a, typename Tile::Shared& shared, int warpgroup)
      : a(a),
        shared(shared),
        share(a),
        warpgroup(warpgroup),
        thread(threadIdx.x % 128),
        lane(threadIdx.x % 32),
        row(64 * warpgroup + thread / 32 * 16 + lane / 4),
        x_tile(tile_descriptor(shared.x[0], 0)),
        own(row * Tile::kRowBytes +
            (Tile::kFormat == WeightFormat::kInt4 ? lane / 8 * 16 : lane / 4 * 16 + lane % 4 * 2)) {}

  // ---- weights ----

  __device__ __forceinline__ uint32_t less_zero(uint32_t pair, int half) const {
    if constexpr (Tile::kZeros) return few_rows::minus<T>(pair, zero[half]);
    return pair;
  }

  // Products [kFirst, kFirst + kBatch) of the step.
  template <int kFirst>
  __device__ __forceinline__ void convert(Fragments& w) const {
    const uint8_t* weights = shared.weights[stage];
    if constexpr (Tile::kFormat == WeightFormat::kInt4) {
      const uint32_t select = 0x4440 | lane % 4;
#pragma unroll
      for (int i = 0; i < kBatch; i += 2)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint8_t* at = weights + (own ^ (kFirst + i) / 2 * 16) + h * 8 * Tile::kRowBytes;
          const uint4 v = *reinterpret_cast<const uint4*>(at);
          w[i][h] = less_zero(pair_of_int4<T>(v.x, select), h);
          w[i][2 + h] = less_zero(pair_of_int4<T>(v.y, select), h);
          w[i + 1][h] = less_zero(pair_of_int4<T>(v.z, select), h);
          w[i + 1][2 + h] = less_zero(pair_of_int4<T>(v.w, select), h);
        }
    } else {
      using From =
          std::conditional_t<Tile::kFormat == WeightFormat::kInt8, few_rows::FromInt8<T>, few_rows::FromFp8<T>>;
#pragma unroll
      for (int i = 0; i < kBatch; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint8_t* at = weights + (own ^ (kFirst + i) * 16) + h * 8 * Tile::kRowBytes;
          w[i][h] = less_zero(From::template pair<0>(*reinterpret_cast<const uint16_t*>(at)), h);
          w[i][2 + h] = less_zero(From::template pair<0>(*reinterpret_cast<const uint16_t*>(at + 8)), h);
        }
    }
  }

  // ---- scales ----

  // Of the group behind this one, for which a group's time is left.
  __device__ __forceinline__ void load_next() {
    const int g = min(group + 1, a.groups - 1);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      next_scale[h] = few_rows::load_scale(a.scales, grid[h] + g, a.scale_dtype);
      if constexpr (Tile::kZeros) next_zero[h] = a.zeros[grid[h] + g];
    }
  }

  __device__ __forceinline__ void take_zeros() {
    if constexpr (Tile::kZeros) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float z = static_cast<float>(next_zero[h]);
        zero[h] = pack<T>(z, z);
      }
    }
  }

  __device__ __forceinline__ void take_scales() {
#pragma unroll
    for (int h = 0; h < 2; h++) scale[h] = next_scale[h].value(a.scale_dtype);
    group++;
    load_next();
  }

  // Asks for the first scales of a tile.
  __device__ __forceinline__ void look_up(int64_t tile) {
#pragma unroll
    for (int h = 0; h < 2; h++) grid[h] = static_cast<uint32_t>(min(first_row(tile) + row + 8 * h, a.N - 1)) * a.groups;
    group = share.steps.first * kStepFeatures / a.group - 1;
    load_next();
  }

  __device__ __forceinline__ void begin() {
    take_zeros();
    take_scales();
    left = (group + 1) * a.group - share.steps.first * kStepFeatures;
#pragma unroll
    for (int e = 0; e < Tile::kCols / 2; e++) sums[e] = part[e] = 0.f;
  }

  __device__ __forceinline__ void fold() {
#pragma unroll
    for (int e = 0; e < Tile::kCols / 2; e++) {
      sums[e] = fmaf(part[e], scale[e / 2 % 2], sums[e]);
      part[e] = 0.f;
    }
  }

  // ---- products ----

  __device__ __forceinline__ void release(int stage) {
    if (lane == 0) barrier_arrive(&shared.empty[stage]);
  }

  template <int kFirst>
  __device__ __forceinline__ void multiply(const Fragments& w) {
    const uint64_t x = x_tile + stage * descriptor_step(Tile::kXBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int at = kFirst + i;
      Products::template rs_add<Along::kColumns>(
          part, w[i], x + at / 4 * descriptor_step(Tile::kPanel * 2) + at % 4 * descriptor_step(32));
    }
    wgmma_commit();
  }

  // Products [kFirst, kFirst + kBatch) of a step: their weights are converted while those before still run.
  template <int kFirst>
  __device__ __forceinline__ void batch(Fragments& w, int before) {
    const bool new_group = left <= 0;
    if (new_group) take_zeros(), left += a.group;
    left -= 64;
    convert<kFirst>(w);
    wgmma_wait<0>(part);
    if (kFirst == 0 && before >= 0) release(before);
    if (new_group) fold(), take_scales();
    multiply<kFirst>(w);
  }

  __device__ __forceinline__ void walk() {
    Fragments w[2];
    int before = -1;
#pragma unroll 1
    for (int step = share.steps.first; step < share.steps.last; step++) {
      barrier_wait(&shared.full[stage], parity);
      batch<0>(w[0], before);
      batch<kBatch>(w[1], before);
      before = stage;
      if (++stage == Tile::kStages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>(part);
    release(before);
    fold();
  }

  // ---- the end of a tile ----

  __device__ __forceinline__ int first_row(int64_t tile) const {
    return static_cast<int>(tile / a.tiles_of_x) * Tile::kRows;
  }

  __device__ __forceinline__ void hand_over(uint64_t* barrier) const {  // to all blocks; one arrival per warp
    __syncwarp();
    if (lane < a.split) barrier_arrive_in(lane, barrier);
  }

  // Adds up this block's share of the sums that its warpgroup, and the same one of the other blocks, have, and writes
  // it.
  __device__ __forceinline__ void join(int64_t tile, uint32_t round) {
    barrier_wait_cluster(&shared.partials_empty[warpgroup], round & 1 ^ 1);  // all have read those before
#pragma unroll
    for (int e = 0; e < Tile::kCols / 2; e++)
      shared.partial[(e / 4 * 8 + lane % 4 * 2 + e % 2) * Tile::kPitch + row + e / 2 % 2 * 8] = sums[e];
    hand_over(&shared.partials_full[warpgroup]);
    barrier_wait_cluster(&shared.partials_full[warpgroup], round & 1);
    if (a.split == 1)
      add_up<1>(tile);
    else if (a.split == 2)
      add_up<2>(tile);
    else if (a.split == 4)
      add_up<4>(tile);
    else
      add_up<8>(tile);
    hand_over(&shared.partials_empty[warpgroup]);
  }

  // All loads are under way before the first is waited for.
  template <int kSplit>
  __device__ __forceinline__ void add_up(int64_t tile) const {
    constexpr int kAll = Tile::kCols / kSplit * 16, kVectors = (kAll + 127) / 128;  // of four sums; and of a thread
    if (kAll < 128 && thread >= kAll) return;
    const int col = thread / 16 * kSplit + static_cast<int>(cluster_rank()), at = 64 * warpgroup + thread % 16 * 4;
    float4 v[kVectors][kSplit];
#pragma unroll
    for (int s = 0; s < kSplit; s++) {
      const uint32_t from = address_in(s, shared.partial + col * Tile::kPitch + at);
#pragma unroll
      for (int i = 0; i < kVectors; i++) v[i][s] = load_in(from + i * 8 * kSplit * Tile::kPitch * 4);
    }
    const int n = first_row(tile) + at, m = static_cast<int>(tile % a.tiles_of_x) * Tile::kCols + col;
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      float4 sum = v[i][0];
#pragma unroll
      for (int s = 1; s < kSplit; s++) sum.x += v[i][s].x, sum.y += v[i][s].y, sum.z += v[i][s].z, sum.w += v[i][s].w;
      const int to = m + i * 8 * kSplit;
      if (to < a.M && n < a.N) write(static_cast<int64_t>(to) * a.N, n, sum);
    }
  }

  __device__ __forceinline__ void write(int64_t row_of_y, int n, float4 sum) const {
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
    const int count = min(4, a.N - n);
    T* y = static_cast<T*>(a.y) + row_of_y + n;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (a.bias && i < count) v[i] += to_float(static_cast<const T*>(a.bias)[n + i]);
    if (a.N % 4 == 0) {
      *reinterpret_cast<uint2*>(y) = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3])};
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < count) y[i] = from_float<T>(v[i]);
    }
  }

  __device__ __forceinline__ void run() {
    uint32_t round = 0;
    look_up(share.first_tile);
    for (int64_t tile = share.first_tile; tile < a.tiles; tile += share.stride, round++) {
      begin();
      walk();
      if (tile + share.stride < a.tiles) look_up(tile + share.stride);
      join(tile, round);
    }
    barrier_wait_cluster(&shared.partials_empty[warpgroup],
                         round & 1 ^ 1);  // shared memory must outlive those who read it
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) linear_many_rows_kernel(const __grid_constant__ Args args) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(raw + (1024 - shared_address(raw) % 1024) % 1024);
  const int warp = uniform(threadIdx.x / 32);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; i++)
      barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], Tile::kWarps);
    for (int i = 0; i < Tile::kGroups; i++)
      barrier_init(&shared.partials_full[i], args.split * 4), barrier_init(&shared.partials_empty[i], args.split * 4);
    barrier_init_fence();
  }
  __syncthreads();
  cluster_sync();
  if (warp < 4) {
    decrease_registers<Tile::kProducerRegisters>();
    if (warp == 0 && elect_one()) produce<Tile>(args, shared);
  } else {
    increase_registers<Tile::kConsumerRegisters>();
    if (!args.constant) wait_for_predecessor();
    Consumer<Tile>(args, shared, warp / 4 - 1).run();
  }
}

}  // namespace cs336::many_rows
