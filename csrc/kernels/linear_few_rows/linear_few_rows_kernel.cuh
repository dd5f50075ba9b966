// y = x w^T + b for up to 64 rows of x. Each warp streams rows of weights, kTiles times eight of them, 64 bytes of each
// at a time, through a ring of its own in shared memory, and multiplies them as they come:
//
//   y (16 rows of x, 8 rows of weights) += x (16, 16) w^T (16, 8)                       m16n8k16, fp32 sums
//
// A product does not care in which order it meets the features, so that a lane takes eight neighbours of a row of x, 16
// bytes, and the same eight of a row of weights: four lanes a row, 32 features, two products. `split` warps of a block
// are a team that shares the chunks of a tile; their sums are added up in shared memory in one order.
#pragma once
#include "common/async.cuh"
#include "common/mma.cuh"
#include "common/vec.cuh"
#include "kernels/linear_few_rows/linear_few_rows.h"
#include "kernels/linear_few_rows/linear_few_rows_plan.h"
#include "kernels/linear_few_rows/weights.cuh"

namespace cs336::few_rows {

using cuda::LinearFewRowsParams;
using cuda::WeightFormat;

constexpr int kThreads = kWarps * 32;
constexpr int kRingBytes = 96 * 1024;  // of a block: two blocks fit on a multiprocessor, the second one to read ahead

// How a warp is shaped for up to 8 * kEights rows of x.
template <WeightFormat kFormat, int kEights>
struct Shape {
  static constexpr int kRowTiles = (kEights + 1) / 2;  // 16 rows of x each; the upper half of one for 8 is zeros
  static constexpr int kMostTiles = kFormat == WeightFormat::kLikeX ? 4 : 2;  // registers for scaled sums too
  static constexpr int kTiles = kEights < kMostTiles ? kEights : kMostTiles;  // of weights: they share the loads of x
  static constexpr int kRows = kTiles * kTileRows;                            // of weights
  static constexpr int kStages = kRingBytes / (kWarps * kTiles * 32 * 16);
  static constexpr int kPartial = kEights * 8 * kRows;  // floats: what a warp hands to its team
  static constexpr int kSharedBytes = kRingBytes + kWarps * kPartial * 4;
};

// Where the vector of lane t of row g lies: so that words, pairs of words and vectors are all read without bank
// conflicts, by lanes that want four, two and one of them next to each other.
__device__ __forceinline__ int slot_of(int g, int t) { return 4 * g + (t ^ ((g >> 1 & 1) * 2 + (g >> 2 & 1))); }

// The chunks of a warp, one after the other.
struct Walk {
  int tile, chunk;
  int member, split, teams, chunks;
  __device__ __forceinline__ void next() {
    chunk += split;
    if (chunk >= chunks) {
      chunk = member;
      tile += teams;
    }
  }
  __device__ __forceinline__ bool is_last_of_tile() const { return chunk + split >= chunks; }
};

template <typename T, WeightFormat kFormat, int kEights>
class Warp {
  using S = Shape<kFormat, kEights>;
  using W = Weights<T, kFormat>;

 public:
  __device__ Warp(const LinearFewRowsParams& p, const Plan& plan, uint4* shared)
      : p_(p),
        plan_(plan),
        lane_(threadIdx.x % 32),
        g_(lane_ / 4),
        t_(lane_ % 4),
        member_(threadIdx.x / 32 % plan.split),
        team_(threadIdx.x / 32 / plan.split),
        bytes_(p.K / 32 * W::kBytes + p.K % 32 * W::kBytes / 32),
        ring_(shared + threadIdx.x / 32 * S::kStages * S::kTiles * 32),
        partials_(reinterpret_cast<float*>(shared + kRingBytes / 16) + team_ * plan.split * S::kPartial) {}

  __device__ void run() {
    const int tiles = (p_.N + S::kRows - 1) / S::kRows;
    const int first = team_ * gridDim.x + blockIdx.x;
    const int chunks = (bytes_ + kChunkBytes - 1) / kChunkBytes;
    const Walk start{first, member_, member_, plan_.split, plan_.teams(), chunks};
    Walk ahead = start;
#pragma unroll 1
    for (int i = 0; i < S::kStages; i++, ahead.next()) prefetch(ahead);
    allow_successor();
    wait_for_predecessor();
    ahead = start;
    int stage = 0;
    for (; stage < S::kStages - 1; stage++, ahead.next()) copy(ahead, stage);
    clear(sums_);
    for (Walk here = start; here.tile < tiles; here.next()) {
      copy(ahead, stage);
      ahead.next();
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
      wait_copies<S::kStages - 1>();
      __syncwarp();
      multiply(here, stage);
      __syncwarp();  // all have read what the next copy overwrites
      if (here.is_last_of_tile()) {
        join(here.tile);
        clear(sums_);
      }
    }
  }

 private:
  using Sums = float[S::kRowTiles][S::kTiles][4];

  __device__ __forceinline__ static void clear(Sums& sums) {
#pragma unroll
    for (int m = 0; m < S::kRowTiles; m++)
#pragma unroll
      for (int i = 0; i < S::kTiles; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) sums[m][i][c] = 0.f;
  }

  // This lane's 16 bytes of row i * 8 + g of a tile; whether they are there.
  __device__ __forceinline__ const char* source(const Walk& at, int i, bool& live) const {
    const int n = at.tile * S::kRows + i * kTileRows + g_, byte = at.chunk * kChunkBytes + t_ * 16;
    live = n < p_.N && byte < bytes_;
    return static_cast<const char*>(p_.weight) + (live ? n * p_.weight_stride + byte : 0);
  }

  __device__ __forceinline__ void prefetch(const Walk& at) const {
#pragma unroll
    for (int i = 0; i < S::kTiles; i++) {
      bool live;
      const char* from = source(at, i, live);
      if (live) prefetch_L2(from);
    }
  }

  __device__ __forceinline__ void copy(const Walk& at, int stage) const {
#pragma unroll
    for (int i = 0; i < S::kTiles; i++) {
      bool live;
      const char* from = source(at, i, live);
      copy_async(ring_ + (stage * S::kTiles + i) * 32 + slot_of(g_, t_), from, live);
    }
    commit_copies();
  }

  // Eight features of a row of x, or zeros.
  __device__ __forceinline__ uint4 features(int m, int k) const {
    return m < p_.M && k < p_.K ? load<T>(p_.x, m * p_.x_stride + k) : uint4{0, 0, 0, 0};
  }

  __device__ __forceinline__ void multiply(const Walk& at, int stage) {
    const uint4* tiles = ring_ + stage * S::kTiles * 32;
    [[maybe_unused]] Sums part;
    [[maybe_unused]] float scales[S::kTiles][2];
    [[maybe_unused]] float zeros[S::kTiles];
    constexpr bool kScaled = kFormat != WeightFormat::kLikeX;
    [[maybe_unused]] const bool whole = p_.group >= p_.K || p_.group % (W::kPieces * cuda::kFeatures) == 0;
#pragma unroll
    for (int j = 0; j < W::kPieces; j++) {
      const int first = (at.chunk * W::kPieces + j) * cuda::kFeatures, k = first + t_ * 8;
      if constexpr (kScaled) {
        if (j == 0 || !whole) {
          load_scales(scales, zeros, at.tile, first);
          clear(part);
        }
      }
      uint32_t w[S::kTiles][4];
#pragma unroll
      for (int i = 0; i < S::kTiles; i++) {
        W::take(w[i], tiles + i * 32, g_, t_, j);
        if constexpr (kScaled) {
          if (p_.zeros) W::subtract(w[i], zeros[i]);
        }
      }
#pragma unroll
      for (int m = 0; m < S::kRowTiles; m++) {
        const uint4 low = W::in_order(features(m * 16 + g_, k));
        const uint4 high = kEights == 1 ? uint4{0, 0, 0, 0} : W::in_order(features(m * 16 + g_ + 8, k));
#pragma unroll
        for (int i = 0; i < S::kTiles; i++) {
          float(&to)[4] = kScaled ? part[m][i] : sums_[m][i];
          multiply_add<T>(to, {low.x, high.x, low.y, high.y}, w[i][0], w[i][1]);
          multiply_add<T>(to, {low.z, high.z, low.w, high.w}, w[i][2], w[i][3]);
        }
      }
      if constexpr (kScaled) {
        if (j == W::kPieces - 1 || !whole) {
#pragma unroll
          for (int m = 0; m < S::kRowTiles; m++)
#pragma unroll
            for (int i = 0; i < S::kTiles; i++)
#pragma unroll
              for (int c = 0; c < 4; c++) sums_[m][i][c] += part[m][i][c] * scales[i][c % 2];
        }
      }
    }
  }

  // Of the group of feature k: the scales of the two rows of weights whose sums this lane has, the zero of its own row.
  __device__ __forceinline__ void load_scales(float (&scales)[S::kTiles][2], float (&zeros)[S::kTiles], int tile,
                                              int k) const {
    const int groups = (p_.K + p_.group - 1) / p_.group, group = k < p_.K ? k / p_.group : 0;
#pragma unroll
    for (int i = 0; i < S::kTiles; i++) {
      const int n = tile * S::kRows + i * kTileRows;
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int64_t row = min(n + 2 * t_ + c, p_.N - 1);
        scales[i][c] = load_scale(p_.scales, row * groups + group, p_.scale_dtype);
      }
      const int64_t row = min(n + g_, p_.N - 1);
      zeros[i] = p_.zeros ? p_.zeros[row * groups + group] : 0.f;
    }
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
    for (int m = 0; m < S::kRowTiles; m++)
#pragma unroll
      for (int i = 0; i < S::kTiles; i++)
#pragma unroll
        for (int half = 0; half < (kEights == 1 ? 1 : 2); half++)
          *reinterpret_cast<float2*>(mine + (m * 16 + half * 8 + g_) * S::kRows + i * kTileRows + t_ * 2) =
              make_float2(sums_[m][i][half * 2], sums_[m][i][half * 2 + 1]);
    sync_team();
    for (int e = member_ * 32 + lane_; e < p_.M * S::kRows; e += plan_.split * 32) {
      const int n = tile * S::kRows + e % S::kRows;
      if (n >= p_.N) continue;
      float sum = 0.f;
      for (int s = 0; s < plan_.split; s++) sum += partials_[s * S::kPartial + e];
      if (p_.bias) sum += to_float(static_cast<const T*>(p_.bias)[n]);
      static_cast<T*>(p_.y)[static_cast<int64_t>(e / S::kRows) * p_.N + n] = from_float<T>(sum);
    }
  }

  const LinearFewRowsParams& p_;
  const Plan& plan_;
  const int lane_, g_, t_;          // of a tile of 8 x 4 lanes, row and column
  const int member_, team_, bytes_;  // of a row of weights
  uint4* const ring_;
  float* const partials_;
  Sums sums_;
};

template <typename T, WeightFormat kFormat, int kEights>
__global__ void __launch_bounds__(kThreads) linear_few_rows_kernel(const LinearFewRowsParams p, const Plan plan) {
  extern __shared__ uint4 shared[];
  Warp<T, kFormat, kEights>(p, plan, shared).run();
}

}  // namespace cs336::few_rows
