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

constexpr int kMaxThreads = 1024;

// Enough blocks must be resident: their loads in flight, 32 to 128 KB a multiprocessor, are what keeps memory busy.
constexpr int max_registers(int vecs, bool residual, bool centred, bool hold) {
  if (centred) return vecs == 1 ? (hold ? 40 : 32) : vecs == 2 ? (hold ? 64 : 48) : hold ? 96 : 64;
  if (residual) return vecs == 1 ? (hold ? 40 : 32) : vecs == 2 ? (hold ? 48 : 40) : hold ? 72 : 56;
  return vecs == 1 ? 32 : vecs == 2 ? 40 : vecs == 4 ? (hold ? 56 : 48) : hold ? 96 : 64;
}

// ---- kernels ----

// kHold: w and b are loaded right behind x and held as they are, in x's dtype. Loads come back in the order in which
// they are made, so those made behind the sums, one vector after the other, each wait for memory again.
template <typename T, int kVecs, Span kSpan, bool kResidual, bool kCentred, bool kHold>
__global__ void __maxnreg__(max_registers(kVecs, kResidual, kCentred, kHold))
    norm_fwd_kernel(const NormFwdParams p, const RowLayout layout, const int first_wave) {
  constexpr int kSize = kVec<T>;
  using Sum = RowSum<kSpan, 1, kMaxThreads>;
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
      if (kHold && row == 0) {  // if every row did, a few cache lines would serve them all: 57 instead of 34 us
        prefetch_L2(static_cast<const T*>(p.w) + place.column(v));
        if (kCentred && p.b) prefetch_L2(static_cast<const T*>(p.b) + place.column(v));
      }
    }
  }
  wait_for_predecessor();

  uint4 x[kVecs], residual[kResidual ? kVecs : 1], w[kHold ? kVecs : 1], b[kHold && kCentred ? kVecs : 1];
  float values[kSize], other[kSize], total[1] = {0.f};
  const auto load_live = [&](const void* rows, int64_t row, int v) {
    return place.has(v) ? load<T>(rows, row + place.column(v)) : uint4{};
  };
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    x[v] = load_live(p.x, x_row, v);
    if constexpr (kResidual) residual[v] = load_live(p.residual, residual_row, v);
  }
  if constexpr (kHold) {
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      w[v] = load_live(p.w, 0, v);
      if constexpr (kCentred) b[v] = p.b ? load_live(p.b, 0, v) : uint4{};
    }
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
  row_sum(total);
  float mean = 0.f;
  if constexpr (kCentred) {
    mean = total[0] * inverse_N;
    total[0] = 0.f;
    forget_derived(place.mine);
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      forget_derived(x[v]);
      unpack<T>(x[v], values);
      const float centre = place.has(v) ? mean : 0.f;  // past the row's end x[v] is zeros
#pragma unroll
      for (int i = 0; i < kSize; i++) total[0] += (values[i] - centre) * (values[i] - centre);
    }
    row_sum(total);
  }
  const float rstd = rsqrtf(total[0] * inverse_N + p.eps);

  forget_derived(place.mine);
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    forget_derived(x[v]);
    if (!place.has(v)) continue;
    const auto features = [&](const uint4& held, const void* params) {
      if constexpr (kHold)
        unpack<T>(held, other);
      else
        load_features<T>(other, params, is_float, place.column(v));
    };
    unpack<T>(x[v], values);
    features(w[kHold ? v : 0], p.w);
#pragma unroll
    for (int i = 0; i < kSize; i++) values[i] = (values[i] - mean) * rstd * other[i];
    if (kCentred && p.b) {
      features(b[kHold && kCentred ? v : 0], p.b);
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

// Vectors a thread, by the 16-byte vectors of a row. It depends on the rows' length alone, never on their number: the
// order of the sums, and so a row's bits, must not. Many vectors keep much in flight, few are soon summed. H200, bf16,
// us for x of 64 MB / 1 MB (row_vecs is N / 8):
//   N                  512         1024        2048        4096        8192        16384       32768
//   RMSNorm    1       80  / 1.6   40.5 / 1.6  38.0 / 1.7  45   / 2.5
//              2       33.9 / 1.6  40.2 / 1.7  32.7 / 1.8  33.6 / 2.5  34.1 / 2.7  37.6 / 2.8  40.0 / 3.2
//              4       33.8 / 2.3  33.4 / 2.3  34.0 / 2.1  34.4 / 2.8  34.5 / 2.8  34.3 / 2.7  36.1 / 2.9
//   residual   1       80  / 2.2   64.2 / 2.0  64.5 / 2.1  66.2 / 2.5  67.4 / 2.6
//              2       65.5 / 2.1  65.0 / 2.4  64.7 / 2.4  65.9 / 3.0  65.0 / 2.7  65.6 / 3.0  68.3 / 3.4
//   LayerNorm  2       35.2 / 2.2  41.4 / 2.2  38.7 / 2.2  40.8 / 2.8  43.7 / 2.9  51   / 3.1  58   / 3.7
//              4       36.4 / 2.7  36.5 / 2.8  37.6 / 3.0  37.9 / 3.1  39.5 / 2.8  43.0 / 3.0  50.1 / 3.3
int vecs_per_thread(int64_t row_vecs, bool residual, bool centred) {
  if (residual && centred) return row_vecs <= 32 ? 1 : row_vecs <= 2048 ? 2 : 4;
  if (residual) return row_vecs <= 32 ? 1 : row_vecs <= 64 ? 2 : row_vecs <= 512 ? 1 : row_vecs <= 2048 ? 2 : 4;
  if (centred) return row_vecs <= 8 ? 1 : row_vecs <= 64 ? 2 : 4;
  return row_vecs <= 8 ? 1 : row_vecs <= 64 ? 2 : row_vecs <= 128 ? 4 : row_vecs <= 1024 ? 2 : row_vecs <= 8192 ? 4 : 8;
}

RowLayout plan_fwd(int64_t row_vecs, bool residual, bool centred, bool has_clusters) {
  RowLayout layout;
  layout.vecs = vecs_per_thread(row_vecs, residual, centred);
  const int threads = divide_up(row_vecs, layout.vecs);
  if (threads <= 32) {
    layout.set_lanes(std::bit_ceil(static_cast<unsigned>(threads)));
    layout.threads = layout.vecs == 4 ? 64 : 128;
    return layout;
  }
  while (has_clusters && layout.cluster < kMaxCluster && divide_up(threads, layout.cluster) > 512) layout.cluster *= 2;
  layout.set_lanes(divide_up(threads, layout.cluster * 32) * 32);
  layout.threads = layout.lanes;
  if (layout.threads > kMaxThreads) layout.vecs = 0;
  return layout;
}

// Whether w and b are worth their registers, which other rows' loads in flight could have: always if all rows are in
// flight at once (N = 16384, 1 MB, H200: 2.7 instead of 3.7 us), else up to some length (8192, 64 MB: 35.8 instead of
// 34.1 us, 4096: 33.6 instead of 33.8).
bool holds_features(const NormFwdParams& p, const RowLayout& layout, int64_t row_vecs, const Device& device) {
  const int registers = max_registers(layout.vecs, p.residual, p.centred, true);
  if (p.w_dtype != p.dtype || layout.threads * registers > device.registers) return false;
  if (layout.blocks <= device.num_sms * (device.registers / (layout.threads * registers))) return true;
  if (p.centred) return p.residual && row_vecs <= 2048;
  return row_vecs <= (p.residual ? 4096 : 512);
}

template <typename T, int kVecs, Span kSpan, bool kResidual, bool kCentred>
void launch_fwd(const NormFwdParams& p, const RowLayout& layout, bool hold, cudaStream_t stream) {
  const int first_wave = current_device().num_sms * std::max(1, 1536 / layout.threads);  // what fits at a time, roughly
  const LaunchShape shape{.grid = static_cast<unsigned>(layout.blocks),
                          .threads = static_cast<unsigned>(layout.threads),
                          .cluster = static_cast<unsigned>(layout.cluster),
                          .dependent = true};
  dispatch_bool(hold, [&](auto hold) {
    launch<norm_fwd_kernel<T, kVecs, kSpan, kResidual, kCentred, hold.value>>(shape, stream, p, layout, first_wave);
  });
}

template <typename T, bool kResidual, bool kCentred>
void choose_fwd(const NormFwdParams& p, const RowLayout& layout, bool hold, cudaStream_t stream) {
  const bool lanes = layout.lanes <= 32;
  switch (layout.vecs) {
    case 1:
      if (lanes) return launch_fwd<T, 1, Span::kLanes, kResidual, kCentred>(p, layout, hold, stream);
      if constexpr (kResidual && !kCentred)
        return launch_fwd<T, 1, Span::kBlock, kResidual, kCentred>(p, layout, hold, stream);
      break;
    case 2:
      if (lanes) return launch_fwd<T, 2, Span::kLanes, kResidual, kCentred>(p, layout, hold, stream);
      if constexpr (kResidual || !kCentred)
        return launch_fwd<T, 2, Span::kBlock, kResidual, kCentred>(p, layout, hold, stream);
      break;
    case 4:
      if constexpr (!kResidual)
        if (lanes) return launch_fwd<T, 4, Span::kLanes, kResidual, kCentred>(p, layout, hold, stream);
      return launch_fwd<T, 4, Span::kBlock, kResidual, kCentred>(p, layout, hold, stream);
    case 8:
      if constexpr (!kResidual && !kCentred)
        return launch_fwd<T, 8, Span::kBlock, kResidual, kCentred>(p, layout, hold, stream);
  }
  throw std::logic_error("norm_fwd: no kernel for " + std::to_string(layout.vecs) + " vectors a thread");
}

template <typename T>
void launch_fwd_any(const NormFwdParams& p, cudaStream_t stream) {
  const unsigned threads = std::min<int64_t>(divide_up(p.N, 4 * 32) * 32, kMaxThreads);
  const unsigned blocks = std::min<int64_t>(p.M, std::numeric_limits<int>::max());
  launch<norm_fwd_any_kernel<T>>({.grid = blocks, .threads = threads, .dependent = true}, stream, p);
}

template <typename T>
void norm_fwd(const NormFwdParams& p, cudaStream_t stream) {
  const int64_t row_vecs = p.N / kVec<T>;
  const Device& device = current_device();
  RowLayout layout;
  if (takes_vectors(p.M, p.N, sizeof(T), {p.x_stride, p.residual_stride}, {p.x, p.residual, p.w, p.b}))
    layout = plan_fwd(row_vecs, p.residual, p.centred, device.has_clusters);
  if (layout.vecs == 0) return launch_fwd_any<T>(p, stream);
  layout.blocks = divide_up(p.M, layout.rows_per_block()) * layout.cluster;
  const bool hold = holds_features(p, layout, row_vecs, device);
  dispatch_bool(p.residual, [&](auto residual) {
    dispatch_bool(p.centred,
                  [&](auto centred) { choose_fwd<T, residual.value, centred.value>(p, layout, hold, stream); });
  });
}

}  // namespace

void norm_fwd(const NormFwdParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.M > 0) dispatch_dtype(p.dtype, [&](auto t) { norm_fwd<decltype(t)>(p, stream); });
}

}  // namespace cs336::cuda
