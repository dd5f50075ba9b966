// y = x w^T + b for up to 64 rows of x, which a block keeps in shared memory, or of more than 16 rows the blocks of a
// cluster, each some of the features. The copy engine streams sixteen rows of
// weights for each warp, 128 bytes of each at a time, through a ring of the warp's own, which multiplies them as they
// come:
//
//   y^T (16 rows of weights, 8 rows of x) += w (16, 16) x^T (16, 8)                     m16n8k16, fp32 sums
//
// A product does not care in which order it meets the features, so that a lane multiplies 16 bytes of each chunk of 64,
// and x lies in shared memory as the lanes want it: in an order of its own within a chunk.
// `split` warps of a block are a team that shares the steps of a tile; their sums are added up in shared memory in one
// order, and those of a cluster's blocks with them.
//
// Of weights that are not like x, both are multiplied as halves, which takes the fewest instructions a weight: each
// chunk of x is kept times the power of two that makes it as large as halves may be, which its sums are divided by.
// What is added to all weights of a chunk, their zero and what their bits stand for, is taken from its sum at once,
// times the sum of the chunk's x.
#pragma once
#include "common/async.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/vec.cuh"
#include "kernels/linear_few_rows/linear_few_rows.h"
#include "kernels/linear_few_rows/linear_few_rows_plan.h"
#include "kernels/linear_few_rows/weights.cuh"

namespace cs336::few_rows {

using cuda::LinearFewRowsParams;

constexpr int kThreads = kWarps * 32;

template <WeightFormat kFormat>
constexpr int bytes_of_row(int K) {
  return static_cast<int>(static_cast<int64_t>(K) * Weights<kFormat>::kBytes / cuda::kFeatures);
}

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// What a block of the cluster has in its shared memory where this one has `mine`.
__device__ __forceinline__ float of_block(const float* mine, int block) {
  float x;
  asm volatile(
      "{.reg .b32 theirs;\n"
      "mapa.shared::cluster.u32 theirs, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [theirs];}"
      : "=f"(x)
      : "r"(hopper::shared_address(mine)), "r"(block)
      : "memory");
  return x;
}

// Of a row, in a step.
template <WeightFormat kFormat>
constexpr int features_of_step() {
  return kChunks * Weights<kFormat>::kPieces * cuda::kFeatures;
}

struct alignas(16) ChunkOfX {
  float factor;     // of its sums
  float base, sum;  // what the bits of weights add to them for it, and what a zero of 1 does
};

// A step of a warp.
struct Step {
  int tile, at;  // at: of the row's steps

  __device__ __forceinline__ Step next(const Plan& plan, int member) const {
    return is_last_of_tile(plan) ? Step{tile + plan.teams, member} : Step{tile, at + plan.split};
  }
  __device__ __forceinline__ bool is_last_of_tile(const Plan& plan) const { return at + plan.split >= plan.steps; }
};

// Up to 8 * kEights rows of x. kZeros: the weights have some.
template <typename T, WeightFormat kFormat, int kEights, bool kZeros>
class Warp {
  using W = Weights<kFormat>;
  static constexpr bool kScaled = kFormat != WeightFormat::kLikeX;
  static constexpr bool kShifted = kScaled && kFormat != WeightFormat::kFp8;
  using X = std::conditional_t<kScaled, __half, T>;  // what is multiplied
  static constexpr bool kCluster = kEights > 2;
  static_assert(kTileRows * kChunks == 32, "a lane has the scale of a row's chunk");

 public:
  // shared: the rings of all warps and their barriers, what they hand to their teams, x and its sums.
  __device__ Warp(const LinearFewRowsParams& p, const CUtensorMap& weight, const Plan& plan, uint4* shared)
      : p_(p),
        weight_(weight),
        plan_(plan),
        warp_(hopper::uniform(threadIdx.x / 32)),
        lane_(threadIdx.x % 32),
        g_(lane_ / 4),
        t_(lane_ % 4),
        row_(g_ / 2 + g_ % 2 * 4),
        member_(warp_ % plan.split),
        team_(warp_ / plan.split),
        ring_(shared + warp_ * plan.stages * kVectors),
        full_(reinterpret_cast<uint64_t*>(shared + kWarps * plan.stages * kVectors) + warp_ * plan.stages),
        partials_(reinterpret_cast<float*>(shared + kWarps * plan.stages * kVectors + kWarps * plan.stages / 2)),
        x_(reinterpret_cast<uint4*>(partials_ + kWarps * kHanded * p.M * kTileRows)),
        x_chunks_(reinterpret_cast<ChunkOfX*>(x_ + rows_kept(p.M, plan.parts) * x_vectors(plan.features))),
        part_(kCluster ? blockIdx.x % plan.parts : 0) {}

  __device__ void run() {
    allow_successor();
    prepare_ring();
    if (!p_.constant) wait_for_predecessor();
    Step here{first_tile(), member_}, ahead = here;
#pragma unroll 1
    for (int stage = 0; stage < plan_.stages; stage++, ahead = ahead.next(plan_, member_)) copy(ahead, stage);
    [[maybe_unused]] Grid grid;
    if constexpr (kScaled) grid = load_grid(here);
    wait_for_predecessor();
    keep_x();
    clear(sums_);
    int stage = 0, phase = 0, round = 0;
    while (here.tile * kTileRows < p_.N) {
      const Step next = here.next(plan_, member_);
      [[maybe_unused]] float scale;
      [[maybe_unused]] int zero;
      if constexpr (kScaled) {
        scale = grid.scale.value(p_.scale_dtype), zero = grid.zero;
        grid = load_grid(next);
      }
      hopper::barrier_wait(full_ + stage, phase);
      multiply(here, stage, scale, zero);
      __syncwarp();  // all lanes have read the stage
      copy(ahead, stage);
      ahead = ahead.next(plan_, member_);
      if (++stage == plan_.stages) stage = 0, phase ^= 1;
      if (here.is_last_of_tile(plan_)) {
        if constexpr (kCluster)
          join_cluster(round, true);
        else
          join(here.tile, round % kHanded);
        clear(sums_);
        round++;
      }
      here = next;
    }
    if constexpr (kCluster) {
      for (; round < plan_.rounds; round++) join_cluster(round, false);
      cluster_wait();  // others may have read this block's sums
    }
  }

 private:
  static constexpr int kHanded = handed_tiles(kEights * 8);

  // Of a cluster's teams neighbours have tiles side by side; of blocks each has its share.
  __device__ __forceinline__ int first_tile() const {
    const int block = blockIdx.x, blocks = gridDim.x;
    return kCluster ? block / plan_.parts * (kWarps / plan_.split) + team_ : team_ * blocks + block;
  }

  // Row row_ of half i of the tile and rows 2 t, 2 t + 1 of x: at 2 i and behind it.
  static constexpr int kAtOnce = kEights < 4 ? kEights : 4;
  using Sums = float[kEights][4];
  using Part = float[kAtOnce][4];

  struct Grid {  // of one chunk of one row of a step: lane row * kChunks + chunk has it
    Scale scale;
    int zero;
  };

  template <int N>
  __device__ __forceinline__ static void clear(float (&sums)[N][4]) {
#pragma unroll
    for (int h = 0; h < N; h++)
#pragma unroll
      for (int c = 0; c < 4; c++) sums[h][c] = 0.f;
  }

  __device__ __forceinline__ void prepare_ring() const {
    if (hopper::elect_one()) {
      hopper::prefetch_map(&weight_);
#pragma unroll 1
      for (int stage = 0; stage < plan_.stages; stage++) hopper::barrier_init(full_ + stage, 1);
      hopper::barrier_init_fence();
    }
    __syncwarp();
  }

  // A step's weights to a stage of the ring: zeros behind the last row and the last feature.
  __device__ __forceinline__ void copy(const Step& step, int stage) const {
    const int row = step.tile * kTileRows;
    if (row >= p_.N || !hopper::elect_one()) return;
    hopper::barrier_arrive_expect(full_ + stage, kStepBytes);
    hopper::copy_in(&weight_, ring_ + stage * kVectors, full_ + stage, (part_ * plan_.steps + step.at) * kStepWidth,
                    row);
  }

  // x to shared memory, zeros behind its last feature. The loads of a vector of some rows are under way before one is
  // waited for.
  __device__ __forceinline__ void keep_x() const {
    constexpr int kLoads = 4, kOfChunk = 4 * W::kPieces;    // vectors of a chunk: neighbouring lanes have them
    const int vectors = x_vectors(plan_.features) - kXPad;  // a multiple of 32: a warp has all lanes here, or none
#pragma unroll 1
    for (int at = threadIdx.x; at < vectors; at += kThreads) {
      const int in_chunk = at % kOfChunk;
      const int k = part_ * plan_.features + (at - in_chunk + in_chunk % 4 * W::kPieces + in_chunk / 4) * 8;
#pragma unroll 1
      for (int first = 0; first < p_.M; first += kLoads) {
        uint4 x[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; i++)
          x[i] = first + i < p_.M && k < p_.K ? load<T>(p_.x, (first + i) * p_.x_stride + k) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
          const int m = first + i;
          if (m >= p_.M) break;
          if constexpr (kScaled) {
            ChunkOfX chunk;
            x[i] = as_halves<kOfChunk>(x[i], chunk);
            if (lane_ % kOfChunk == 0) x_chunks_[m * x_chunks(plan_.features) + at / kOfChunk] = chunk;
          }
          x_[m * x_vectors(plan_.features) + at] = x[i];
        }
      }
    }
    __syncthreads();
  }

  // Eight features of x as they are kept, and their chunk, whose other features the other lanes of kLanes have.
  template <int kLanes>
  __device__ __forceinline__ static uint4 as_halves(const uint4& vector, ChunkOfX& chunk) {
    float x[8], largest = 0.f;
    unpack<T>(vector, x);
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    const uint32_t exponent = max(__float_as_uint(largest) >> 23, 15u);       // biased by 127
    const float factor = __uint_as_float((127 + 127 + 14 - exponent) << 23);  // largest * factor is from 2^14 on
    chunk.factor = __uint_as_float((exponent - 14) << 23);
    uint32_t kept[4];
    float of_kept = 0.f, of_x = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      constexpr auto feature = [](int i, int which) { return W::pair(i, which); };
      const float share = W::share(feature(i, 0));  // of both
      const __half2 pair = __floats2half2_rn(x[feature(i, 0)] * (factor * share), x[feature(i, 1)] * (factor * share));
      kept[i] = reinterpret_cast<const uint32_t&>(pair);
      if constexpr (kShifted) {
        const float sum = __low2float(pair) + __high2float(pair);
        of_kept += sum;
        of_x += sum / share;
      }
    }
    if constexpr (kShifted) {
#pragma unroll
      for (int lanes = 1; lanes < kLanes; lanes *= 2) {
        of_kept += __shfl_xor_sync(~0u, of_kept, lanes);
        of_x += __shfl_xor_sync(~0u, of_x, lanes);
      }
      chunk.base = W::kBase * of_kept + W::kAdd * of_x;
      chunk.sum = of_x;
    }
    return {kept[0], kept[1], kept[2], kept[3]};
  }

  __device__ __forceinline__ void multiply(const Step& step, int stage, [[maybe_unused]] float scale,
                                           [[maybe_unused]] int zero) {
    const int first = step.at * kChunks * W::kPieces * 4 + t_, vectors = x_vectors(plan_.features);
    const uint4* here = ring_ + stage * kVectors;
#pragma unroll kCluster ? 1 : kChunks
    for (int c = 0; c < kChunks; c++) {
      uint4 bits[2];  // the engine has put vector v of row r where v ^ r % 8 would be
#pragma unroll
      for (int i = 0; i < 2; i++) bits[i] = here[(i * 8 + row_) * 8 + ((c * 4 + t_) ^ row_)];
#pragma unroll
      for (int h0 = 0; h0 < kEights; h0 += kAtOnce) {  // which takes the weights apart anew: registers are short
        if (h0 > 0) hide(bits);
        [[maybe_unused]] Part part;
        if constexpr (kScaled) clear(part);
#pragma unroll kEights == 8 ? (kZeros ? 1 : 2) : W::kPieces
        for (int j = 0; j < W::kPieces; j++) {
          uint32_t w[2][4];
#pragma unroll
          for (int i = 0; i < 2; i++) W::take(w[i], bits[i], j);
#pragma unroll
          for (int h = 0; h < kAtOnce; h++) {
            const uint4 x = x_[row_of_x(h0 + h, g_) * vectors + first + (c * W::kPieces + j) * 4];
            float (&to)[4] = kScaled ? part[h] : sums_[h0 + h];
            multiply_add<X>(to, {w[0][0], w[1][0], w[0][1], w[1][1]}, x.x, x.y);
            multiply_add<X>(to, {w[0][2], w[1][2], w[0][3], w[1][3]}, x.z, x.w);
          }
        }
        if constexpr (kScaled) {
          float of_row[2], zeros[2] = {};
#pragma unroll
          for (int i = 0; i < 2; i++) {
            of_row[i] = __shfl_sync(~0u, scale, lane_of(i, row_, c));
            if constexpr (kZeros) zeros[i] = static_cast<float>(__shfl_sync(~0u, zero, lane_of(i, row_, c)));
          }
#pragma unroll
          for (int h = 0; h < kAtOnce; h++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const int row = row_of_x(h0 + h, 2 * t_ + e);
              const ChunkOfX x = x_chunks_[row * x_chunks(plan_.features) + step.at * kChunks + c];
#pragma unroll
              for (int i = 0; i < 2; i++) {
                float of_chunk = part[h][2 * i + e];  // less what each of its weights is too large by, times its x
                if constexpr (kShifted) of_chunk -= kZeros ? x.base + zeros[i] * x.sum : x.base;
                sums_[h0 + h][2 * i + e] += of_chunk * (of_row[i] * x.factor);
              }
            }
        }
      }
    }
  }

  // A row of x in shared memory. What is multiplied with those that are not there is not looked at: a cluster has room
  // for them.
  __device__ __forceinline__ int row_of_x(int h, int row) const {
    return kCluster ? 8 * h + row : min(8 * h + row, p_.M - 1);
  }

  // From the compiler, which would else keep what it has made of them.
  __device__ __forceinline__ static void hide(uint4 (&bits)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) asm volatile("" : "+r"(bits[i].x), "+r"(bits[i].y), "+r"(bits[i].z), "+r"(bits[i].w));
  }

  // Which has the grid of chunk c of row `row` of half i of the tile.
  __device__ __forceinline__ static int lane_of(int i, int row, int c) { return (i * 8 + row) * kChunks + c; }

  // Of this lane's row and chunk: one load, which nothing waits for before the next step.
  __device__ __forceinline__ Grid load_grid(const Step& step) const {
    const int n = min(step.tile * kTileRows + lane_ / kChunks, p_.N - 1);
    const int chunk = (part_ * plan_.steps + step.at) * kChunks + lane_ % kChunks;
    const int of_row = chunk * plan_.per_group >> kDivide;
    const uint32_t group = static_cast<uint32_t>(n) * plan_.groups + min(of_row, plan_.groups - 1);
    return {.scale = load_scale(p_.scales, group, p_.scale_dtype), .zero = kZeros ? p_.zeros[group] : 0};
  }

  __device__ __forceinline__ void sync_team() const {
    if (plan_.split == 1)
      __syncwarp();
    else
      asm volatile("bar.sync %0, %1;" ::"r"(team_), "r"(plan_.split * 32) : "memory");
  }

  // Adds up the team's sums of a tile and writes them. `handed`: where they meet, elsewhere than those of the tile
  // before where there is room, so that none waits for it to be read.
  __device__ __forceinline__ void join(int tile, int handed) const {
    const int of_warp = p_.M * kTileRows;
    float* ours = partials_ + (handed * kWarps + team_ * plan_.split) * of_warp;
    if constexpr (kHanded == 1) sync_team();
#pragma unroll
    for (int h = 0; h < kEights; h++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int m = 8 * h + 2 * t_ + e % 2;
        if (m < p_.M) ours[member_ * of_warp + m * kTileRows + e / 2 * 8 + row_] = sums_[h][e];
      }
    sync_team();
    for (int e = member_ * 32 + lane_; e < of_warp; e += plan_.split * 32) {
      const int n = tile * kTileRows + e % kTileRows;
      if (n >= p_.N) continue;
      float sum = 0.f;
      for (int s = 0; s < plan_.split; s++) sum += ours[s * of_warp + e];
      if (p_.bias) sum += to_float(static_cast<const T*>(p_.bias)[n]);
      static_cast<T*>(p_.y)[static_cast<int64_t>(e / kTileRows) * p_.N + n] = from_float<T>(sum);
    }
    __syncwarp();  // products want a whole warp
  }

  // The same of a cluster: its blocks add up and write some of the sums of all its tiles each. All its warps are here
  // once a round; those without a tile have no sums.
  __device__ void join_cluster(int round, bool has_tile) const {
    const int of_warp = p_.M * kTileRows, teams = kWarps / plan_.split, columns = teams * kTileRows;
    if (round > 0) cluster_wait();  // all have read the round before
    if (has_tile) {
#pragma unroll
      for (int h = 0; h < kEights; h++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int m = 8 * h + 2 * t_ + e % 2;
          if (m < p_.M) partials_[warp_ * of_warp + m * kTileRows + e / 2 * 8 + row_] = sums_[h][e];
        }
    }
    cluster_arrive();
    cluster_wait();
    const int64_t first = static_cast<int64_t>(round * plan_.teams + blockIdx.x / plan_.parts * teams) * kTileRows;
    for (int i = part_ * kThreads + threadIdx.x; i < p_.M * columns; i += plan_.parts * kThreads) {
      const int m = i / columns, column = i % columns, team = column / kTileRows;
      const int64_t n = first + column;
      if (n >= p_.N) continue;
      const float* of_team = partials_ + team * plan_.split * of_warp + m * kTileRows + column % kTileRows;
      float sum = 0.f;
      for (int part = 0; part < plan_.parts; part++)
        for (int s = 0; s < plan_.split; s++) sum += of_block(of_team + s * of_warp, part);
      if (p_.bias) sum += to_float(static_cast<const T*>(p_.bias)[n]);
      static_cast<T*>(p_.y)[m * static_cast<int64_t>(p_.N) + n] = from_float<T>(sum);
    }
    __syncwarp();
    cluster_arrive();
  }

  const LinearFewRowsParams& p_;
  const CUtensorMap& weight_;
  const Plan& plan_;
  const int warp_, lane_, g_, t_;  // of a tile of 8 x 4 lanes, row and column
  const int row_;                  // of weights that lanes of row g multiply: neighbours are in different banks
  const int member_, team_;
  uint4* const ring_;
  uint64_t* const full_;  // of each stage of the ring
  float* const partials_;
  uint4* const x_;            // (M, x_vectors(features))
  ChunkOfX* const x_chunks_;  // (M, x_chunks(features)), where weights are not like x
  const int part_;            // of the features
  Sums sums_;
};

template <typename T, WeightFormat kFormat, int kEights, bool kZeros>
__global__ void __launch_bounds__(kThreads, kEights == 1 ? 2 : 1)
    linear_few_rows_kernel(const __grid_constant__ LinearFewRowsParams p, const __grid_constant__ CUtensorMap weight,
                           const __grid_constant__ Plan plan) {
  extern __shared__ __align__(1024) uint4 shared[];
  Warp<T, kFormat, kEights, kZeros>(p, weight, plan, shared).run();
}

}  // namespace cs336::few_rows
