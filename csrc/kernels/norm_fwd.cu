// y = (s - mean) * rstd * w + b of the rows s = x + residual. RMSNorm has no mean and no b.
//
// A row lies in the registers of some lanes, a block or a cluster of blocks; it is read once, reduced and written.
// Blocks do their rows once and leave: the scheduler then hands out rows in order, and memory sees one compact window
// move through x and y. (Blocks that stay and prefetch their next rows reached 3.8-3.9 instead of 4.1 TB/s, H200.)
#include <limits>
#include <stdexcept>
#include <string>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/nvtx.h"
#include "kernels/norm.h"
#include "kernels/norm_rows.cuh"

namespace cs336::cuda {
namespace {

// ---- kernels ----

// The features of a thread as they are, in the rows' dtype: loaded right behind x. Loads come back in the order in
// which they are made, so those made behind the sums, one vector after the other, each wait for memory again.
template <int kVecs, bool kHold>
struct HeldFeatures {
  uint4 vecs[kVecs];
  __device__ __forceinline__ void hold(int v, const uint4& packed) { vecs[v] = packed; }
  __device__ __forceinline__ uint4 operator[](int v) const { return vecs[v]; }
};

template <int kVecs>
struct HeldFeatures<kVecs, false> {
  __device__ __forceinline__ void hold(int, const uint4&) {}
  __device__ __forceinline__ uint4 operator[](int) const { return {}; }
};

// The row's vector v, zeros past its end.
template <typename T, Access kAccess, Span kSpan>
__device__ __forceinline__ uint4 load_live(const void* rows, int64_t row, const Place<T, kSpan>& place, int v) {
  return place.has(v) ? load<T, kAccess>(rows, row + place.column(v)) : uint4{};
}

template <typename T, Access kAccess, int kVecs, bool kHold>
__device__ __forceinline__ void read_features(float (&out)[kVec<T>], const HeldFeatures<kVecs, kHold>& held, int v,
                                              const void* features, bool is_float, int column) {
  if constexpr (kHold)
    unpack<T>(held[v], out);
  else
    load_features<T, kAccess>(out, features, is_float, column);
}

template <typename T, int kVecs, Span kSpan, bool kResidual, bool kCentred, bool kHold>
__device__ __forceinline__ void prefetch_row(const NormFwdParams& p, const Place<T, kSpan>& place, int64_t row) {
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    if (!place.has(v)) continue;
    prefetch_L2(static_cast<const T*>(p.x) + row * p.x_stride + place.column(v));
    if constexpr (kResidual) prefetch_L2(static_cast<const T*>(p.residual) + row * p.residual_stride + place.column(v));
    if (kHold && row == 0) {  // if every row did, a few cache lines would serve them all: 57 instead of 34 us
      prefetch_L2(static_cast<const T*>(p.w) + place.column(v));
      if (kCentred && p.b) prefetch_L2(static_cast<const T*>(p.b) + place.column(v));
    }
  }
}

// x becomes x + residual, rounded to T and stored. Past the row's end both are zeros, and nothing is stored.
template <typename T, int kVecs, Span kSpan>
__device__ __forceinline__ void add_residual(uint4 (&x)[kVecs], const uint4 (&residual)[kVecs], void* sum, int64_t row,
                                             const Place<T, kSpan>& place) {
  float values[kVec<T>], other[kVec<T>];
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    unpack<T>(x[v], values);
    unpack<T>(residual[v], other);
#pragma unroll
    for (int i = 0; i < kVec<T>; i++) values[i] += other[i];
    x[v] = pack<T>(values);
    if (place.has(v)) store<T>(sum, row + place.column(v), x[v]);
  }
}

// This thread's part of the sum of x, or of x^2 if kSquare.
template <typename T, bool kSquare, int kVecs>
__device__ __forceinline__ float part_of_sum(const uint4 (&x)[kVecs]) {
  float values[kVec<T>], total = 0.f;
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    unpack<T>(x[v], values);
#pragma unroll
    for (int i = 0; i < kVec<T>; i++) total += kSquare ? values[i] * values[i] : values[i];
  }
  return total;
}

// This thread's part of the sum of (x - mean)^2.
template <typename T, int kVecs, Span kSpan>
__device__ __forceinline__ float part_of_squares(uint4 (&x)[kVecs], float mean, const Place<T, kSpan>& place) {
  float values[kVec<T>], total = 0.f;
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    forget_derived(x[v]);
    unpack<T>(x[v], values);
    const float centre = place.has(v) ? mean : 0.f;  // past the row's end x[v] is zeros
#pragma unroll
    for (int i = 0; i < kVec<T>; i++) total += (values[i] - centre) * (values[i] - centre);
  }
  return total;
}

template <typename T, int kVecs, Span kSpan, bool kResidual, bool kCentred, bool kHold, Access kAccess>
__global__ void __maxnreg__(max_fwd_registers(kVecs, kResidual, kCentred, kHold || kAccess == Access::kElements))
    norm_fwd_kernel(const NormFwdParams p, const RowLayout layout, const int first_wave) {
  using Sum = RowSum<kSpan, 1, kMaxFwdThreads>;
  __shared__ typename Sum::Shared sum_memory;
  Place<T, kSpan> place(p.M, p.N, layout);
  const int64_t row = min(place.row(place.first), place.M - 1);  // past the end the last row is done again
  const int64_t y_row = row * p.N;
  const bool is_float = p.w_dtype == Dtype::F32;
  const float inverse_N = 1.f / static_cast<float>(place.N);

  allow_successor();
  Sum row_sum(sum_memory, layout.lanes, layout.cluster);
  if (blockIdx.x < first_wave)  // hides 1 us of the 34 us that 64 MB take
    prefetch_row<T, kVecs, kSpan, kResidual, kCentred, kHold>(p, place, row);
  wait_for_predecessor();

  uint4 x[kVecs], residual[kVecs];
  HeldFeatures<kVecs, kHold> w;
  HeldFeatures<kVecs, kHold && kCentred> b;
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    x[v] = load_live<T, kAccess>(p.x, row * p.x_stride, place, v);
    if constexpr (kResidual) residual[v] = load_live<T, kAccess>(p.residual, row * p.residual_stride, place, v);
  }
  if constexpr (kHold) {
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      w.hold(v, load_live<T, kAccess>(p.w, 0, place, v));
      if (kCentred && p.b) b.hold(v, load_live<T, kAccess>(p.b, 0, place, v));
    }
  }

  if constexpr (kResidual) add_residual<T>(x, residual, p.sum, y_row, place);
  float mean = 0.f, total[1] = {part_of_sum<T, !kCentred>(x)};
  row_sum(total);
  if constexpr (kCentred) {
    mean = total[0] * inverse_N;
    forget_derived(place.mine);
    total[0] = part_of_squares<T>(x, mean, place);
    row_sum(total);
  }
  const float rstd = rsqrtf(total[0] * inverse_N + p.eps);

  forget_derived(place.mine);
  float values[kVec<T>], other[kVec<T>];
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    forget_derived(x[v]);
    if (!place.has(v)) continue;
    unpack<T>(x[v], values);
    read_features<T, kAccess>(other, w, v, p.w, is_float, place.column(v));
#pragma unroll
    for (int i = 0; i < kVec<T>; i++) values[i] = (values[i] - mean) * rstd * other[i];
    if (kCentred && p.b) {
      read_features<T, kAccess>(other, b, v, p.b, is_float, place.column(v));
#pragma unroll
      for (int i = 0; i < kVec<T>; i++) values[i] += other[i];
    }
    store<T>(p.y, y_row + place.column(v), pack<T>(values));
  }
  if (place.mine == 0) {
    p.rstd[row] = rstd;
    if constexpr (kCentred) p.mean[row] = mean;
  }
}

// Rows that are not whole vectors: one block a row, one element a thread, the row read again for every sum.
template <typename T>
__global__ void __launch_bounds__(kMaxFwdThreads) norm_fwd_any_kernel(const NormFwdParams p) {
  using Sum = RowSum<Span::kBlock, 1, kMaxFwdThreads>;
  __shared__ typename Sum::Shared sum_memory;
  Sum row_sum(sum_memory, blockDim.x, 1);
  const bool is_float = p.w_dtype == Dtype::F32;
  const float inverse_N = 1.f / static_cast<float>(p.N);
  allow_successor();
  wait_for_predecessor();
  for (int64_t row = blockIdx.x; row < p.M; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* y = static_cast<T*>(p.y) + row * p.N;
    if (p.residual) {
      const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
      T* sum = static_cast<T*>(p.sum) + row * p.N;
      for (int64_t i = threadIdx.x; i < p.N; i += blockDim.x)
        sum[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
      x = sum;  // every thread reads back what it wrote itself
    }
    float mean = 0.f, total[1] = {0.f};
    if (p.centred) {
      for (int64_t i = threadIdx.x; i < p.N; i += blockDim.x) total[0] += to_float(x[i]);
      row_sum(total);
      mean = total[0] * inverse_N;
      total[0] = 0.f;
    }
    for (int64_t i = threadIdx.x; i < p.N; i += blockDim.x) {
      const float value = to_float(x[i]) - mean;
      total[0] += value * value;
    }
    row_sum(total);
    const float rstd = rsqrtf(total[0] * inverse_N + p.eps);
    for (int64_t i = threadIdx.x; i < p.N; i += blockDim.x) {
      const float value = (to_float(x[i]) - mean) * rstd * feature<T>(p.w, is_float, i);
      y[i] = from_float<T>(p.b ? value + feature<T>(p.b, is_float, i) : value);
    }
    if (threadIdx.x == 0) {
      p.rstd[row] = rstd;
      if (p.centred) p.mean[row] = mean;
    }
  }
}

// ---- launchers ----

template <typename T, int kVecs, Span kSpan, bool kResidual, bool kCentred>
void launch_fwd(const NormFwdParams& p, const FwdPlan& plan, bool aligned, cudaStream_t stream) {
  const RowLayout& layout = plan.layout;
  const int first_wave = current_device().num_sms * std::max(1, 1536 / layout.threads);  // what fits at a time, roughly
  const LaunchShape shape{
      .grid = dim3(layout.blocks), .threads = dim3(layout.threads), .cluster = dim3(layout.cluster), .dependent = true};
  if (!aligned)
    launch<norm_fwd_kernel<T, kVecs, kSpan, kResidual, kCentred, false, Access::kElements>>(shape, stream, p, layout,
                                                                                            first_wave);
  else
    dispatch_bool(plan.hold, [&](auto hold) {
      launch<norm_fwd_kernel<T, kVecs, kSpan, kResidual, kCentred, hold.value, Access::kVectors>>(shape, stream, p,
                                                                                                  layout, first_wave);
    });
}

template <typename T, int kVecs, bool kResidual, bool kCentred>
bool launch_fwd_if(const NormFwdParams& p, const FwdPlan& plan, bool aligned, cudaStream_t stream) {
  if (plan.layout.vecs != kVecs) return false;
  if (plan.span == Span::kLanes) {
    if constexpr (has_fwd_kernel(kVecs, Span::kLanes, kResidual, kCentred))
      return launch_fwd<T, kVecs, Span::kLanes, kResidual, kCentred>(p, plan, aligned, stream), true;
  } else {
    if constexpr (has_fwd_kernel(kVecs, Span::kBlock, kResidual, kCentred))
      return launch_fwd<T, kVecs, Span::kBlock, kResidual, kCentred>(p, plan, aligned, stream), true;
  }
  return false;
}

template <typename T, bool kResidual, bool kCentred>
void choose_fwd(const NormFwdParams& p, const FwdPlan& plan, bool aligned, cudaStream_t stream) {
  const bool launched = launch_fwd_if<T, 1, kResidual, kCentred>(p, plan, aligned, stream) ||
                        launch_fwd_if<T, 2, kResidual, kCentred>(p, plan, aligned, stream) ||
                        launch_fwd_if<T, 4, kResidual, kCentred>(p, plan, aligned, stream) ||
                        launch_fwd_if<T, 8, kResidual, kCentred>(p, plan, aligned, stream);
  if (!launched)
    throw std::logic_error("norm_fwd: no kernel for " + std::to_string(plan.layout.vecs) + " vectors a thread");
}

template <typename T>
void launch_fwd_any(const NormFwdParams& p, cudaStream_t stream) {
  const unsigned threads = std::min<int64_t>(divide_up(p.N, 4 * 32) * 32, kMaxFwdThreads);
  const unsigned blocks = std::min<int64_t>(p.M, std::numeric_limits<int>::max());
  launch<norm_fwd_any_kernel<T>>({.grid = blocks, .threads = threads, .dependent = true}, stream, p);
}

template <typename T>
void norm_fwd(const NormFwdParams& p, cudaStream_t stream) {
  const bool aligned = all_aligned(p.M, sizeof(T), {p.x_stride, p.residual_stride}, {p.x, p.residual, p.w, p.b});
  const NormShape shape{p.M, p.N, sizeof(T), p.centred, p.residual != nullptr};
  const FwdPlan plan = plan_fwd(shape, aligned, p.w_dtype == p.dtype, current_device());
  if (plan.layout.vecs == 0) return launch_fwd_any<T>(p, stream);
  dispatch_bool(p.residual, [&](auto residual) {
    dispatch_bool(p.centred,
                  [&](auto centred) { choose_fwd<T, residual.value, centred.value>(p, plan, aligned, stream); });
  });
}

}  // namespace

void norm_fwd(const NormFwdParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.M > 0) dispatch_dtype(p.dtype, [&](auto t) { norm_fwd<decltype(t)>(p, stream); });
}

}  // namespace cs336::cuda
