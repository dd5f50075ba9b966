// y = x w^T + b for up to 16 rows of x, which a block keeps in shared memory. Each warp streams rows of weights, eight
// or sixteen of them, some 64-byte chunks of each at a time, through a ring of its own, and multiplies them as they
// come:
//
//   y^T (16 rows of weights, 8 rows of x) += w (16, 16) x^T (16, 8)                     m16n8k16, fp32 sums
//
// A product does not care in which order it meets the features, so that a lane multiplies the 16 bytes of each chunk
// that it has copied itself, and x lies in shared memory as the lanes want it: in an order of its own within a chunk.
// `split` warps of a block are a team that shares the steps of a tile; their sums are added up in shared memory in one
// order. What is added to all weights of a chunk, their zero and what their bits stand for, is taken from its sum at
// once, times the sum of the chunk's x.
#pragma once
#include "common/async.cuh"
#include "common/mma.cuh"
#include "common/vec.cuh"
#include "kernels/linear_few_rows/linear_few_rows.h"
#include "kernels/linear_few_rows/linear_few_rows_plan.h"
#include "kernels/linear_few_rows/weights.cuh"

namespace cs336::few_rows {

using cuda::LinearFewRowsParams;

constexpr int kThreads = kWarps * 32;

// How a warp is shaped for up to 8 * kEights rows of x.
template <WeightFormat kFormat, int kEights>
struct Shape {
  static constexpr int kTiles = kFormat == WeightFormat::kLikeX ? 1 : 2;  // of 8 rows of weights: one product of both
  static constexpr int kRows = kTiles * kTileRows;                        // of weights
  static constexpr int kChunks = kStepBytes / (kRows * kChunkBytes);      // of each row in a step
  static constexpr int kVectors = kStepBytes / 16;                        // of a step
  static constexpr int kPartial = kEights * 8 * kRows;                    // floats: what a warp hands to its team
};

template <typename T, WeightFormat kFormat>
constexpr int bytes_of_row(int K) {
  return static_cast<int>(static_cast<int64_t>(K) * Weights<T, kFormat>::kBytes / cuda::kFeatures);
}

// The steps of a warp, one after the other.
struct Walk {
  int tile, step;
  int member, split, teams, steps;
  __device__ __forceinline__ bool next() {  // whether that is one of the next tile
    step += split;
    if (step < steps) return false;
    step = member;
    tile += teams;
    return true;
  }
  __device__ __forceinline__ bool is_last_of_tile() const { return step + split >= steps; }
};

// kZeros: the weights have some.
template <typename T, WeightFormat kFormat, int kEights, bool kZeros>
class Warp {
  using S = Shape<kFormat, kEights>;
  using W = Weights<T, kFormat>;
  static constexpr bool kScaled = kFormat != WeightFormat::kLikeX;
  static constexpr bool kShifted = kZeros || W::kOffset != 0;
  static_assert(S::kRows * S::kChunks == 32, "a lane has the scale of a row's chunk");

 public:
  // shared: the rings of all warps, what they hand to their teams, x.
  __device__ Warp(const LinearFewRowsParams& p, const Plan& plan, uint4* shared)
      : p_(p),
        plan_(plan),
        lane_(threadIdx.x % 32),
        g_(lane_ / 4),
        t_(lane_ % 4),
        member_(threadIdx.x / 32 % plan.split),
        team_(threadIdx.x / 32 / plan.split),
        bytes_(bytes_of_row<T, kFormat>(p.K)),
        ring_(shared + threadIdx.x / 32 * kStages * S::kVectors),
        partials_(reinterpret_cast<float*>(shared + kRingBytes / 16) + team_ * plan.split * S::kPartial),
        x_(shared + kRingBytes / 16 + kWarps * S::kPartial / 4),
        x_sums_(reinterpret_cast<float*>(x_ + p.M * x_vectors(p.K))),
        groups_((p.K + p.group - 1) / p.group),
        per_group_(((1 << kDivide) - 1) / ((p.group + kFeaturesOfChunk - 1) / kFeaturesOfChunk) + 1) {}

  __device__ void run() {
    const int tiles = (p_.N + S::kRows - 1) / S::kRows;
    const Walk start{.tile = team_ * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x),
                     .step = member_,
                     .member = member_,
                     .split = plan_.split,
                     .teams = plan_.teams(),
                     .steps = (bytes_ + S::kChunks * kChunkBytes - 1) / (S::kChunks * kChunkBytes)};
    allow_successor();
    if (!p_.constant) wait_for_predecessor();
    Source ahead(start, p_, g_, t_);
    int stage = 0;
#pragma unroll 1
    for (; stage < kStages - 1; stage++, ahead.next()) copy(ahead, stage);
    [[maybe_unused]] Grid grid, next_grid;
    if constexpr (kScaled) next_grid = load_grid(start);
    wait_for_predecessor();
    keep_x();
    clear(sums_);
    for (Walk here = start; here.tile < tiles;) {
      copy(ahead, stage);
      ahead.next();
      stage = stage + 1 == kStages ? 0 : stage + 1;
      Walk next = here;
      next.next();
      if constexpr (kScaled) {
        grid = next_grid;
        next_grid = load_grid(next);
      }
      wait_copies<kStages - 1>();
      multiply(here, stage, grid);
      if (here.is_last_of_tile()) {
        join(here.tile);
        clear(sums_);
      }
      here = next;
    }
  }

 private:
  static constexpr int kFeaturesOfChunk = W::kPieces * cuda::kFeatures;
  static constexpr int kDivide = 20;  // bits: chunks of a row and chunks of a group, multiplied, stay below

  using Sums = float[kEights][4];  // row g of tile i and rows 2 t, 2 t + 1 of x: at 2 i and behind it

  struct Source {  // of a warp's copies: where a lane's first 16 bytes of a step are
    Walk at;
    const char* from;
    int64_t below, to_next_step, to_next_tile;

    __device__ __forceinline__ Source(const Walk& start, const LinearFewRowsParams& p, int g, int t)
        : at(start), below(kTileRows * p.weight_stride), to_next_step(start.split * S::kChunks * kChunkBytes) {
      const int64_t n = static_cast<int64_t>(at.tile) * S::kRows + g;
      from = static_cast<const char*>(p.weight) + n * p.weight_stride + at.step * S::kChunks * kChunkBytes + t * 16;
      const int before_last = (at.steps - 1 - at.member) / at.split;
      to_next_tile = static_cast<int64_t>(at.teams) * S::kRows * p.weight_stride - before_last * to_next_step;
    }

    __device__ __forceinline__ void next() { from += at.next() ? to_next_tile : to_next_step; }
  };

  struct Grid {  // of one chunk of one row of a step: lane row * kChunks + chunk has it
    Scale scale;
    int zero;
  };

  __device__ __forceinline__ static void clear(Sums& sums) {
#pragma unroll
    for (int h = 0; h < kEights; h++)
#pragma unroll
      for (int c = 0; c < 4; c++) sums[h][c] = 0.f;
  }

  // 16 bytes of each of this lane's chunks.
  __device__ __forceinline__ void copy(const Source& source, int stage) const {
    const Walk& at = source.at;
#pragma unroll
    for (int i = 0; i < S::kTiles; i++) {
      const int n = at.tile * S::kRows + i * kTileRows + g_, byte = at.step * S::kChunks * kChunkBytes + t_ * 16;
      const char* from = source.from + (i ? source.below : 0);
      uint4* to = ring_ + stage * S::kVectors + i * S::kChunks * 32 + lane_;
#pragma unroll
      for (int c = 0; c < S::kChunks; c++)
        copy_async(to + c * 32, from + c * kChunkBytes, n < p_.N && byte + c * kChunkBytes < bytes_);
    }
    commit_copies();
  }

  // x to shared memory, zeros behind its last feature. All of a thread's loads are under way before it waits for one.
  __device__ __forceinline__ void keep_x() const {
    constexpr int kAtOnce = 4, kOfChunk = 4 * W::kPieces;
    const int row = x_vectors(p_.K), vectors = p_.M * row;
    for (int first = threadIdx.x; first < vectors; first += kAtOnce * kThreads) {
      uint4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int v = first + i * kThreads, m = v / row, at = v - m * row, in_chunk = at % kOfChunk;
        const int k = (at - in_chunk + in_chunk % 4 * W::kPieces + in_chunk / 4) * 8;
        x[i] = v < vectors && k < p_.K ? load<T>(p_.x, m * p_.x_stride + k) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        if (first + i * kThreads < vectors) x_[first + i * kThreads] = W::in_order(x[i]);
    }
    __syncthreads();
    if constexpr (kShifted) sum_x();
  }

  // The sum of each chunk of x, by four lanes.
  __device__ __forceinline__ void sum_x() const {
    const int chunks = x_vectors(p_.K) / (4 * W::kPieces), all = p_.M * chunks;  // zeros behind the last feature
    for (int first = threadIdx.x / 32 * 8; first < all; first += kThreads / 4) {
      const int at = min(first + g_, all - 1), m = at / chunks, c = at - m * chunks;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < W::kPieces; j++) sum += sum_of(x_[m * x_vectors(p_.K) + (c * W::kPieces + j) * 4 + t_]);
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (t_ == 0) x_sums_[m * x_sums(p_.K) + c] = sum;
    }
    __syncthreads();
  }

  __device__ __forceinline__ static float sum_of(uint4 vector) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) sum += sum_of_pair<T>(words[i]);
    return sum;
  }

  __device__ __forceinline__ void multiply(const Walk& at, int stage, [[maybe_unused]] const Grid& grid) {
    // What lanes of rows that are not there multiply is not looked at.
    const int first = at.step * S::kChunks * W::kPieces * 4 + t_, vectors = x_vectors(p_.K);
    const uint4* x_row[kEights];
#pragma unroll
    for (int h = 0; h < kEights; h++) x_row[h] = x_ + min(8 * h + g_, p_.M - 1) * vectors + first;
    [[maybe_unused]] float scale;
    if constexpr (kScaled) scale = grid.scale.value(p_.scale_dtype);
#pragma unroll
    for (int c = 0; c < S::kChunks; c++) {
      [[maybe_unused]] Sums part;
      if constexpr (kShifted)
        shift(part, at.step * S::kChunks + c, grid.zero, c);
      else if constexpr (kScaled)
        clear(part);
      uint4 bits[S::kTiles];
#pragma unroll
      for (int i = 0; i < S::kTiles; i++) bits[i] = ring_[stage * S::kVectors + (i * S::kChunks + c) * 32 + lane_];
#pragma unroll
      for (int j = 0; j < W::kPieces; j++) {
        uint32_t w[2][4] = {};  // without a second tile zeros
#pragma unroll
        for (int i = 0; i < S::kTiles; i++) W::take(w[i], bits[i], j);
#pragma unroll
        for (int h = 0; h < kEights; h++) {
          const uint4 x = x_row[h][(c * W::kPieces + j) * 4];
          float (&to)[4] = kScaled ? part[h] : sums_[h];
          multiply_add<T>(to, {w[0][0], w[1][0], w[0][1], w[1][1]}, x.x, x.y);
          multiply_add<T>(to, {w[0][2], w[1][2], w[0][3], w[1][3]}, x.z, x.w);
        }
      }
      if constexpr (kScaled) {
#pragma unroll
        for (int i = 0; i < S::kTiles; i++) {
          const float of_row = __shfl_sync(~0u, scale, lane_of(i, g_, c));
#pragma unroll
          for (int h = 0; h < kEights; h++)
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; e++) sums_[h][e] += part[h][e] * of_row;
        }
      }
    }
  }

  // What a chunk's products are added to: less what each of its weights is too large by, times the sum of its x.
  __device__ __forceinline__ void shift(Sums& part, int chunk, int zero, int c) const {
    const float* sums = x_sums_ + chunk;
    float too_large[S::kTiles];
#pragma unroll
    for (int i = 0; i < S::kTiles; i++)
      too_large[i] = -static_cast<float>(W::kOffset + (kZeros ? __shfl_sync(~0u, zero, lane_of(i, g_, c)) : 0));
#pragma unroll
    for (int h = 0; h < kEights; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float sum = sums[min(8 * h + 2 * t_ + e, p_.M - 1) * x_sums(p_.K)];
#pragma unroll
        for (int i = 0; i < S::kTiles; i++) part[h][2 * i + e] = too_large[i] * sum;
      }
  }

  // Which has the grid of chunk c of row `row` of tile i.
  __device__ __forceinline__ static int lane_of(int i, int row, int c) {
    return (i * kTileRows + row) * S::kChunks + c;
  }

  // Of this lane's row and chunk: one load, which nothing waits for before the next step.
  __device__ __forceinline__ Grid load_grid(const Walk& at) const {
    const int n = min(at.tile * S::kRows + lane_ / S::kChunks, p_.N - 1);
    const int of_row = (at.step * S::kChunks + lane_ % S::kChunks) * per_group_ >> kDivide;
    const uint32_t group = static_cast<uint32_t>(n) * groups_ + min(of_row, groups_ - 1);
    return {.scale = load_scale(p_.scales, group, p_.scale_dtype), .zero = kZeros ? p_.zeros[group] : 0};
  }

  __device__ __forceinline__ void sync_team() const {
    if (plan_.split == 1)
      __syncwarp();
    else
      asm volatile("bar.sync %0, %1;" ::"r"(team_), "r"(plan_.split * 32) : "memory");
  }

  // Adds up the team's sums of a tile and writes them.
  __device__ __forceinline__ void join(int tile) const {
    sync_team();  // all have read the tile before
    float* mine = partials_ + member_ * S::kPartial;
#pragma unroll
    for (int h = 0; h < kEights; h++)
#pragma unroll
      for (int e = 0; e < 2 * S::kTiles; e++)
        mine[(8 * h + 2 * t_ + e % 2) * S::kRows + e / 2 * kTileRows + g_] = sums_[h][e];
    sync_team();
    for (int e = member_ * 32 + lane_; e < p_.M * S::kRows; e += plan_.split * 32) {
      const int n = tile * S::kRows + e % S::kRows;
      if (n >= p_.N) continue;
      float sum = 0.f;
      for (int s = 0; s < plan_.split; s++) sum += partials_[s * S::kPartial + e];
      if (p_.bias) sum += to_float(static_cast<const T*>(p_.bias)[n]);
      static_cast<T*>(p_.y)[static_cast<int64_t>(e / S::kRows) * p_.N + n] = from_float<T>(sum);
    }
    __syncwarp();  // products want a whole warp
  }

  const LinearFewRowsParams& p_;
  const Plan& plan_;
  const int lane_, g_, t_;           // of a tile of 8 x 4 lanes, row and column
  const int member_, team_, bytes_;  // of a row of weights
  uint4* const ring_;
  float* const partials_;
  uint4* const x_;       // (M, x_vectors(K))
  float* const x_sums_;  // (M, x_sums(K)), where weights are shifted
  const int groups_;     // of a row
  const int per_group_;  // one by the chunks of a group, in 2^-kDivide, rounded up
  Sums sums_;
};

template <typename T, WeightFormat kFormat, int kEights, bool kZeros>
__global__ void __launch_bounds__(kThreads, kEights == 1 ? 2 : 1)
    linear_few_rows_kernel(const LinearFewRowsParams p, const Plan plan) {
  extern __shared__ uint4 shared[];
  Warp<T, kFormat, kEights, kZeros>(p, plan, shared).run();
}

}  // namespace cs336::few_rows
