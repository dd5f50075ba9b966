// out = x * scale, eight elements a thread at a time.
#include <algorithm>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/nvtx.h"
#include "common/vec.cuh"
#include "kernels/scale.h"

namespace cs336::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;     // of a thread at a time: 16 bytes of a 16-bit dtype, 32 of float
constexpr int kBlocksPerSM = 8;  // 2048 threads
constexpr int kUnroll = 2;

template <typename T>
__device__ __forceinline__ void load_eight(float (&out)[kElements], const T* x) {
#pragma unroll
  for (int i = 0; i < kElements; i += kVec<T>) {
    float part[kVec<T>];
    unpack<T>(load<T>(x, i), part);
#pragma unroll
    for (int j = 0; j < kVec<T>; j++) out[i + j] = part[j];
  }
}

template <typename T>
__device__ __forceinline__ void store_eight(T* out, const float (&x)[kElements]) {
#pragma unroll
  for (int i = 0; i < kElements; i += kVec<T>) {
    float part[kVec<T>];
#pragma unroll
    for (int j = 0; j < kVec<T>; j++) part[j] = x[i + j];
    store<T>(out, i, pack<T>(part));
  }
}

template <typename X, typename Out>
__global__ void __launch_bounds__(kThreads) scale_kernel(const ScaleParams p, const bool aligned) {
  allow_successor();
  wait_for_predecessor();
  const float scale = *p.scale;
  if (!p.x && scale == 1.f) return;
  const X* x = static_cast<const X*>(p.x ? p.x : p.out);
  Out* out = static_cast<Out*>(p.out);
  const int64_t first = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads), packed = aligned ? p.numel / kElements : 0;
#pragma unroll kUnroll
  for (int64_t i = first; i < packed; i += step) {
    float values[kElements];
    load_eight<X>(values, x + i * kElements);
#pragma unroll
    for (int k = 0; k < kElements; k++) values[k] *= scale;
    store_eight<Out>(out + i * kElements, values);
  }
  for (int64_t i = packed * kElements + first; i < p.numel; i += step) out[i] = from_float<Out>(to_float(x[i]) * scale);
}

}  // namespace

void scale(const ScaleParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.numel == 0) return;
  const bool aligned = all_aligned(1, 1, {}, {p.x, p.out});
  const int64_t blocks = (p.numel + kThreads * kElements - 1) / (kThreads * kElements);
  const LaunchShape shape{
      .grid = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, current_device().num_sms * kBlocksPerSM))),
      .threads = dim3(kThreads),
      .dependent = true};
  dispatch_dtype(p.x_dtype, [&]<typename X>(X) {
    dispatch_dtype(p.out_dtype, [&]<typename Out>(Out) { launch<scale_kernel<X, Out>>(shape, stream, p, aligned); });
  });
}

}  // namespace cs336::cuda
