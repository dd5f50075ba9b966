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

namespace cs336 {
namespace {

constexpr int kMaxThreads = 1024;

// Enough blocks must be resident: their loads in flight, 32 to 128 KB a multiprocessor, are what keeps memory busy.
constexpr int max_registers(int vecs, bool more) {
  return vecs == 1 ? 32 : vecs == 2 ? 40 : vecs == 4 && !more ? 48 : vecs == 4 ? 56 : 64;
}

// ---- kernels ----

template <typename T, int kVecs, Span kSpan, bool kResidual, bool kCentred>
__global__ void __maxnreg__(max_registers(kVecs, kResidual || kCentred))
    norm_fwd_kernel(const NormFwdParams p, const RowLayout layout, const int first_wave) {
  constexpr int kSize = kVec<T>;
  using Sum = RowSum<kSpan, kCentred ? 3 : 1, kMaxThreads>;
  __shared__ typename Sum::Shared sum_memory;
  Place<T, kSpan> place(p.M, p.N, layout);
  const int64_t row = min(place.row(place.first), place.M - 1);  // past the end the last row is done again
  const int64_t x_row = row * p.x_stride, residual_row = row * p.residual_stride, y_row = row * p.N;
  const bool is_float = p.w_dtype == Dtype::F32;
  const float inverse_N = 1.f / static_cast<float>(place.N);

  allow_successor();
  Sum row_sum(sum_memory, layout.lanes, layout.cluster);
  if (blockIdx.x < first_wave) {  // hides 1 us of the 34 us that 64 MB take
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      if (!place.has(v)) continue;
      prefetch_L2(static_cast<const T*>(p.x) + x_row + place.column(v));
      if constexpr (kResidual) prefetch_L2(static_cast<const T*>(p.residual) + residual_row + place.column(v));
    }
  }
  wait_for_predecessor();

  uint4 x[kVecs], residual[kResidual ? kVecs : 1];
  float values[kSize], other[kSize], total[1] = {0.f};
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    const bool live = place.has(v);
    x[v] = live ? load<T>(p.x, x_row + place.column(v)) : uint4{};
    if constexpr (kResidual) residual[v] = live ? load<T>(p.residual, residual_row + place.column(v)) : uint4{};
  }
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    unpack<T>(x[v], values);
    if constexpr (kResidual) {
      unpack<T>(residual[v], other);
#pragma unroll
      for (int i = 0; i < kSize; i++) values[i] += other[i];
      x[v] = pack<T>(values);
      if (place.has(v)) store<T>(p.sum, y_row + place.column(v), x[v]);
      unpack<T>(x[v], values);
    }
#pragma unroll
    for (int i = 0; i < kSize; i++) total[0] += kCentred ? values[i] : values[i] * values[i];
  }
  float mean = 0.f;
  if constexpr (kCentred) {
    int count = 0;
#pragma unroll
    for (int v = 0; v < kVecs; v++) count += place.has(v) ? kSize : 0;
    const auto squares = [&](float mean) {
      float sum = 0.f;
#pragma unroll
      for (int v = 0; v < kVecs; v++) {
        forget_derived(x[v]);
        if (!place.has(v)) continue;
        unpack<T>(x[v], values);
#pragma unroll
        for (int i = 0; i < kSize; i++) sum += (values[i] - mean) * (values[i] - mean);
      }
      return sum;
    };
    const float2 moments = row_sum.moments(total[0], count, squares);
    mean = moments.x, total[0] = moments.y;
  } else {
    row_sum(total);
  }
  const float rstd = rsqrtf(total[0] * inverse_N + p.eps);

  forget_derived(place.mine);
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    forget_derived(x[v]);
    if (!place.has(v)) continue;
    unpack<T>(x[v], values);
    load_features<T>(other, p.w, is_float, place.column(v));
#pragma unroll
    for (int i = 0; i < kSize; i++) values[i] = (values[i] - mean) * rstd * other[i];
    if (kCentred && p.b) {
      load_features<T>(other, p.b, is_float, place.column(v));
#pragma unroll
      for (int i = 0; i < kSize; i++) values[i] += other[i];
    }
    store<T>(p.y, y_row + place.column(v), pack<T>(values));
  }
  if (place.mine == 0) {
    p.rstd[row] = rstd;
    if constexpr (kCentred) p.mean[row] = mean;
  }
}

// Any length, stride and alignment: one block a row, one element a thread, the row read again for every sum.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) norm_fwd_any_kernel(const NormFwdParams p) {
  using Sum = RowSum<Span::kBlock, 1, kMaxThreads>;
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

// Depends on the rows' length alone, never on their number: the order of the sums, and so a row's bits, must not.
// H200, bf16, 256 MB, TB/s of the copy's 4.23 by vectors a thread (with clusters of 2, 4, 8 from 65536, 131072 on):
//   N              256   512   1024  2048  4096  8192  16384 32768 65536 131072
//   1 (residual)   4.10        4.17  4.19  4.12
//   2              4.09  4.10        4.17  4.11  3.98
//   4                    4.10  4.12  4.13  4.08  4.07  4.08  3.97  3.83  3.65
//   8                                            4.04        4.02  3.86  3.71
int vecs_per_thread(int64_t row_vecs, bool residual, bool centred) {
  if (residual) return row_vecs <= 32 ? 1 : row_vecs <= 64 ? 2 : row_vecs <= 512 ? 1 : row_vecs <= 1024 ? 2 : 4;
  if (row_vecs <= 128) return row_vecs <= 8 ? 1 : row_vecs <= (centred ? 32 : 64) ? 2 : 4;
  return row_vecs <= 512 ? 2 : row_vecs <= 2048 ? 4 : 8;
}

RowLayout plan_fwd(int64_t row_vecs, bool residual, bool centred, bool has_clusters) {
  RowLayout layout;
  layout.vecs = vecs_per_thread(row_vecs, residual, centred);
  const int threads = divide_up(row_vecs, layout.vecs);
  if (threads <= 32) {
    layout.lanes = std::bit_ceil(static_cast<unsigned>(threads));
    layout.threads = layout.vecs == 4 ? 64 : 128;
    return layout;
  }
  while (has_clusters && layout.cluster < kMaxCluster && divide_up(threads, layout.cluster) > 512) layout.cluster *= 2;
  layout.lanes = layout.threads = divide_up(threads, layout.cluster * 32) * 32;
  if (layout.threads > kMaxThreads) layout.vecs = 0;
  return layout;
}

template <typename T, int kVecs, Span kSpan, bool kResidual, bool kCentred>
void launch_fwd(const NormFwdParams& p, const RowLayout& layout, cudaStream_t stream) {
  const int first_wave = current_device().num_sms * std::max(1, 1536 / layout.threads);  // what fits at a time, roughly
  launch<norm_fwd_kernel<T, kVecs, kSpan, kResidual, kCentred>>({.grid = static_cast<unsigned>(layout.blocks),
                                                                 .threads = static_cast<unsigned>(layout.threads),
                                                                 .cluster = static_cast<unsigned>(layout.cluster)},
                                                                stream, p, layout, first_wave);
}

template <typename T, bool kResidual, bool kCentred>
void choose_fwd(const NormFwdParams& p, const RowLayout& layout, cudaStream_t stream) {
  const bool lanes = layout.lanes <= 32;
  switch (layout.vecs) {
    case 1:
      if (lanes) return launch_fwd<T, 1, Span::kLanes, kResidual, kCentred>(p, layout, stream);
      if constexpr (kResidual) return launch_fwd<T, 1, Span::kBlock, kResidual, kCentred>(p, layout, stream);
      break;
    case 2:
      if (lanes) return launch_fwd<T, 2, Span::kLanes, kResidual, kCentred>(p, layout, stream);
      return launch_fwd<T, 2, Span::kBlock, kResidual, kCentred>(p, layout, stream);
    case 4:
      if constexpr (!kResidual)
        if (lanes) return launch_fwd<T, 4, Span::kLanes, kResidual, kCentred>(p, layout, stream);
      return launch_fwd<T, 4, Span::kBlock, kResidual, kCentred>(p, layout, stream);
    case 8:
      if constexpr (!kResidual) return launch_fwd<T, 8, Span::kBlock, kResidual, kCentred>(p, layout, stream);
  }
  throw std::logic_error("norm_fwd: no kernel for " + std::to_string(layout.vecs) + " vectors a thread");
}

template <typename T>
void launch_fwd_any(const NormFwdParams& p, cudaStream_t stream) {
  const unsigned threads = std::min<int64_t>(divide_up(p.N, 4 * 32) * 32, kMaxThreads);
  const unsigned blocks = std::min<int64_t>(p.M, std::numeric_limits<int>::max());
  launch<norm_fwd_any_kernel<T>>({.grid = blocks, .threads = threads}, stream, p);
}

template <typename T>
void norm_fwd(const NormFwdParams& p, cudaStream_t stream) {
  RowLayout layout;
  if (takes_vectors(p.M, p.N, sizeof(T), {p.x_stride, p.residual_stride}, {p.x, p.residual, p.w, p.b}))
    layout = plan_fwd(p.N / kVec<T>, p.residual, p.centred, current_device().has_clusters);
  if (layout.vecs == 0) return launch_fwd_any<T>(p, stream);
  layout.blocks = divide_up(p.M, layout.rows_per_block()) * layout.cluster;
  dispatch_bool(p.residual, [&](auto residual) {
    dispatch_bool(p.centred, [&](auto centred) { choose_fwd<T, residual.value, centred.value>(p, layout, stream); });
  });
}

}  // namespace

void norm_fwd(const NormFwdParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.M > 0) dispatch_dtype(p.dtype, [&](auto t) { norm_fwd<decltype(t)>(p, stream); });
}

}  // namespace cs336
