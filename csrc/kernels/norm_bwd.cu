// With c = x - mean (RMSNorm has no mean), g = dy * rstd * w, and means over the N features of a row:
//   dx = g - mean(g) - c * rstd^2 * mean(g * c) + dsum          (RMSNorm has no mean(g))
//   dw = sum over rows of dy * rstd * c,  db = sum over rows of dy
//
// Blocks stay and loop over rows. Each thread copies its own vectors of the next rows into a ring in shared memory, so
// that loads are in flight while a row is reduced and written. A block keeps its sums for dw and db in registers
// and writes them once, as one row of partials, which norm_bwd_partials.cu adds up.
#include <stdexcept>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/nvtx.h"
#include "kernels/norm_bwd.h"
#include "kernels/norm_rows.cuh"

namespace cs336::cuda {
namespace {

constexpr int kHeld = 16;  // elements per thread up to which w and g stay in registers

// ---- kernels ----

// Copies of the next rows: vectors of dy, x and dsum, and for each thread rstd and mean.
// [stage][stream][vector][thread]
template <typename T, int kVecs, int kStages, Span kSpan, bool kCentred>
struct RowRing {
  enum Stream { kDy, kX, kDsum };

  const NormBwdParams& p;
  const Place<T, kSpan>& place;
  const Ring<kVecs> ring;
  float* stats;  // rstd, mean by stage
  const int num_groups;

  __device__ RowRing(uint4* memory, const NormBwdParams& p, const Place<T, kSpan>& place)
      : p(p),
        place(place),
        ring{memory + threadIdx.x, static_cast<int>(blockDim.x), p.dsum ? 3 : 2},
        stats(reinterpret_cast<float*>(ring.slot(kStages, 0, 0) - threadIdx.x) + threadIdx.x),
        num_groups((place.M + place.rows_per_block - 1) / place.rows_per_block) {}

  __device__ __forceinline__ uint4 vec(int stage, Stream stream, int v) const { return *ring.slot(stage, stream, v); }
  __device__ __forceinline__ float rstd(int stage) const { return stats[2 * stage * blockDim.x]; }
  __device__ __forceinline__ float mean(int stage) const {
    return kCentred ? stats[(2 * stage + 1) * blockDim.x] : 0.f;
  }

  __device__ __forceinline__ void prefetch(int group) const {
    const int64_t row = place.row(group);
    if (row >= place.M) return;
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      if (!place.has(v)) continue;
      prefetch_L2(static_cast<const T*>(p.dy) + row * p.dy_stride + place.column(v));
      prefetch_L2(static_cast<const T*>(p.x) + row * p.x_stride + place.column(v));
    }
  }

  // Zeros past the last row and column: they add nothing to any sum.
  __device__ __forceinline__ void copy_row(int stage, Stream stream, const void* rows, int64_t stride, int64_t row,
                                           bool valid) const {
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      const bool live = valid && place.has(v);
      const T* source = static_cast<const T*>(rows) + (live ? row * stride + place.column(v) : 0);
      copy_async(ring.slot(stage, stream, v), source, live);
    }
  }

  __device__ __forceinline__ void copy(int group, int stage) const {
    if (group < num_groups) {
      const int64_t row = place.row(group);
      const bool valid = row < place.M;
      copy_row(stage, kDy, p.dy, p.dy_stride, row, valid);
      copy_row(stage, kX, p.x, p.x_stride, row, valid);
      if (p.dsum) copy_row(stage, kDsum, p.dsum, p.dsum_stride, row, valid);
      copy_async(stats + 2 * stage * blockDim.x, p.rstd + (valid ? row : 0), valid);
      if constexpr (kCentred) copy_async(stats + (2 * stage + 1) * blockDim.x, p.mean + (valid ? row : 0), valid);
    }
    commit_copies();
  }
};

// The weights of the vector v, zeros past the row's end.
template <typename T, Span kSpan>
__device__ __forceinline__ void load_weights(float (&w)[kVec<T>], const NormBwdParams& p, const Place<T, kSpan>& place,
                                             bool is_float, int v) {
#pragma unroll
  for (int i = 0; i < kVec<T>; i++) w[i] = 0.f;
  if (place.has(v)) load_features<T>(w, p.w, is_float, place.column(v));
}

// The sum of `value` over the rows that this warp holds: its lanes width, 2 width, ... apart.
__device__ __forceinline__ float sum_over_rows_of_warp(float value, int width) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    if (offset >= width) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Adds a block's sums, those of the rows of a warp first, and writes one row of partials.
template <typename T, Span kSpan, int kElements>
__device__ __forceinline__ void write_partials(const float (&sums)[kElements], float* partials, float* parts,
                                               const Place<T, kSpan>& place, int64_t pitch) {
  const int num_parts = kSpan == Span::kLanes ? blockDim.x / 32 : place.rows_per_block;
  const int part = kSpan == Span::kLanes ? threadIdx.x / 32 : place.in_block;
  float* target = num_parts == 1 ? partials : parts + part * pitch;
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kElements; e += 4) {
    float four[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      four[j] = kSpan == Span::kLanes ? sum_over_rows_of_warp(sums[e + j], place.width) : sums[e + j];
    const bool chosen = kSpan != Span::kLanes || threadIdx.x % 32 == place.mine;
    const int v = e / kVec<T>;
    if (chosen && place.has(v)) store<float>(target, place.column(v) + e % kVec<T>, pack<float>(four));
  }
  if (num_parts == 1) return;
  __syncthreads();
  for (int column = threadIdx.x; column < place.N; column += blockDim.x) {
    double sum = 0;
    for (int i = 0; i < num_parts; i++) sum += parts[i * pitch + column];
    partials[column] = static_cast<float>(sum);
  }
}

template <typename T, int kVecs, int kStages, Span kSpan, bool kCentred>
__global__ void __launch_bounds__(kMaxBwdThreads) norm_bwd_kernel(const NormBwdParams p, const RowLayout layout) {
  constexpr int kSize = kVec<T>, kElements = kVecs * kSize;
  constexpr bool kHold = kElements <= kHeld;
  using Sum = RowSum<kSpan, kCentred ? 2 : 1, kMaxBwdThreads>;
  using Rows = RowRing<T, kVecs, kStages, kSpan, kCentred>;
  extern __shared__ uint4 ring_memory[];
  __shared__ typename Sum::Shared sum_memory;
  const Place<T, kSpan> place(p.M, p.N, layout);
  const Rows rows(ring_memory, p, place);
  const bool is_float = p.w_dtype == Dtype::F32;
  const float inverse_N = 1.f / static_cast<float>(place.N);

  allow_successor();
  Sum row_sum(sum_memory, layout.lanes, layout.cluster);
#pragma unroll
  for (int stage = 0; stage < kStages; stage++)  // hides 1 us of the 53 us that 64 MB take
    rows.prefetch(place.first + stage * place.stride);
  wait_for_predecessor();
#pragma unroll
  for (int stage = 0; stage < kStages; stage++) rows.copy(place.first + stage * place.stride, stage);

  float held_w[kHold ? kVecs : 1][kSize], dw[kElements] = {}, db[kCentred ? kElements : 1] = {};
  if constexpr (kHold) {
#pragma unroll
    for (int v = 0; v < kVecs; v++) load_weights<T>(held_w[v], p, place, is_float, v);
  }

  int stage = 0;
  for (int group = place.first; group < rows.num_groups; group += place.stride) {
    float held_g[kHold ? kVecs : 1][kSize], sums[kCentred ? 2 : 1] = {};  // of g * c, of g
    uint4 held_x[kHold ? kVecs : 1];
    float dy[kSize], x[kSize], w[kSize];
    wait_copies<kStages - 1>();
    const float rstd = rows.rstd(stage), mean = rows.mean(stage);
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      const uint4 packed_x = rows.vec(stage, Rows::kX, v);
      unpack<T>(rows.vec(stage, Rows::kDy, v), dy);
      unpack<T>(packed_x, x);
      if constexpr (kHold) {
#pragma unroll
        for (int i = 0; i < kSize; i++) w[i] = held_w[v][i];
      } else {
        load_weights<T>(w, p, place, is_float, v);
      }
#pragma unroll
      for (int i = 0; i < kSize; i++) {
        const float c = x[i] - mean, scaled_dy = dy[i] * rstd, g = scaled_dy * w[i];
        sums[0] += g * c;
        dw[v * kSize + i] += scaled_dy * c;
        if constexpr (kCentred) sums[1] += g, db[v * kSize + i] += dy[i];
        if constexpr (kHold) held_g[v][i] = g;
      }
      if constexpr (kHold) held_x[v] = packed_x;
    }
    const bool used_up = kHold && !p.dsum;  // this stage of the ring
    if (used_up) rows.copy(group + kStages * place.stride, stage);
    row_sum(sums);

    const int64_t row = place.row(group);
    const float slope = sums[0] * inverse_N * rstd * rstd;
    const float offset = kCentred ? mean * slope - sums[1] * inverse_N : 0.f;
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      float g[kSize];
      if constexpr (kHold) {
        unpack<T>(held_x[v], x);
#pragma unroll
        for (int i = 0; i < kSize; i++) g[i] = held_g[v][i];
      } else {
        unpack<T>(rows.vec(stage, Rows::kDy, v), dy);
        unpack<T>(rows.vec(stage, Rows::kX, v), x);
        load_weights<T>(w, p, place, is_float, v);
#pragma unroll
        for (int i = 0; i < kSize; i++) g[i] = dy[i] * rstd * w[i];
      }
#pragma unroll
      for (int i = 0; i < kSize; i++) dy[i] = (kCentred ? g[i] + offset : g[i]) - x[i] * slope;
      if (p.dsum) {
        unpack<T>(rows.vec(stage, Rows::kDsum, v), x);
#pragma unroll
        for (int i = 0; i < kSize; i++) dy[i] += x[i];
      }
      if (row < place.M && place.has(v)) store<T>(p.dx, row * p.N + place.column(v), pack<T>(dy));
    }
    if (!used_up) rows.copy(group + kStages * place.stride, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_copies<0>();

  const int64_t pitch = row_pitch(p.N);
  float *partials = p.partials + place.first * pitch, *parts = reinterpret_cast<float*>(ring_memory);
  write_partials<T>(dw, partials, parts, place, pitch);
  if constexpr (kCentred) write_partials<T>(db, partials + place.stride * pitch, parts, place, pitch);
}

// ---- launchers ----

bool is_aligned(const NormBwdParams& p) {
  return all_aligned(p.M, size_of(p.dtype), {p.dy_stride, p.dsum_stride, p.x_stride}, {p.dy, p.dsum, p.x, p.w});
}

NormShape shape_of(const NormBwdParams& p) { return {p.M, p.N, size_of(p.dtype), p.centred, p.dsum != nullptr}; }

// The number of partials.
template <typename T, int kVecs, int kStages, Span kSpan, bool kCentred>
int launch_bwd(const NormBwdParams& p, const RowLayout& layout, cudaStream_t stream) {
  constexpr auto kKernel = norm_bwd_kernel<T, kVecs, kStages, kSpan, kCentred>;
  LaunchShape shape{
      .grid = dim3(layout.blocks),
      .threads = dim3(layout.threads),
      .shared_bytes = static_cast<size_t>(ring_bytes_per_thread(kVecs, kStages, p.dsum ? 3 : 2)) * layout.threads,
      .cluster = dim3(layout.cluster),
      .dependent = true};
  if (layout.cluster > 1) {  // fewer than its multiprocessors would hold: clusters do not cross their groups
    const int clusters = std::max(1, max_resident_clusters<kKernel>(shape)), planned = layout.blocks / layout.cluster;
    shape.grid.x = std::min(planned, divide_up(p.M, divide_up(p.M, clusters))) * layout.cluster;
  }
  launch<kKernel>(shape, stream, p, layout);
  return static_cast<int>(shape.grid.x / shape.cluster_size());
}

template <typename T, bool kCentred>
int choose_bwd(const NormBwdParams& p, const BwdPlan& plan, cudaStream_t stream) {
  constexpr int kVecs = 16 / kVec<T>, kStages = num_stages(kVecs), kLongStages = num_stages(2 * kVecs);
  const RowLayout& layout = plan.layout;
  if (layout.vecs == 2 * kVecs) return launch_bwd<T, 2 * kVecs, kLongStages, Span::kBlock, kCentred>(p, layout, stream);
  switch (plan.span) {
    case Span::kBlock:
      return launch_bwd<T, kVecs, kStages, Span::kBlock, kCentred>(p, layout, stream);
    case Span::kWarps:
      return launch_bwd<T, kVecs, kStages, Span::kWarps, kCentred>(p, layout, stream);
    case Span::kLanes:
      return plan.stages == 1 ? launch_bwd<T, kVecs, 1, Span::kLanes, kCentred>(p, layout, stream)
                              : launch_bwd<T, kVecs, kStages, Span::kLanes, kCentred>(p, layout, stream);
  }
  throw std::logic_error("norm_bwd: no kernel for this plan");
}

}  // namespace

int64_t norm_bwd_workspace(const NormBwdParams& p) {
  const NormShape shape = shape_of(p);
  return bwd_workspace(shape, plan_bwd(shape, is_aligned(p), current_device()));
}

void norm_bwd(const NormBwdParams& p, cudaStream_t stream) {
  NVTX_FN();
  const BwdPlan plan = plan_bwd(shape_of(p), is_aligned(p), current_device());
  int num_partials = plan.num_partials;
  if (p.M > 0 && plan.layout.vecs > 0) {
    dispatch_dtype(p.dtype, [&]<typename T>(T) {
      dispatch_bool(p.centred, [&](auto centred) { num_partials = choose_bwd<T, centred.value>(p, plan, stream); });
    });
  } else if (p.M > 0) {
    norm_bwd_any(p, num_partials, stream);
  }
  norm_bwd_sum_partials(p, num_partials, stream);
}

}  // namespace cs336::cuda
