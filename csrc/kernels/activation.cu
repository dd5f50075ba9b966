// act(x) * up, and its gradients: streams of 16-byte vectors. A block takes a row; tensors without gaps are cut into
// rows of kFlatRow elements.
#include <stdexcept>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/nvtx.h"
#include "common/vec.cuh"
#include "kernels/activation.h"

namespace cs336::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kFlatRow = 4096;

// ---- activations ----

struct Activated {
  float y, slope;
};

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

template <Activation kActivation>
__device__ __forceinline__ Activated activated(float x) {
  if constexpr (kActivation == Activation::kSilu) {
    const float s = sigmoid(x);
    return {x * s, s * (1.f + x * (1.f - s))};
  } else if constexpr (kActivation == Activation::kGelu) {
    const float cdf = 0.5f * (1.f + erff(x * 0.70710678f));
    return {x * cdf, cdf + x * __expf(-0.5f * x * x) * 0.39894228f};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr float kScale = 1.59576912f;  // sqrt(8 / pi)
    const float s = sigmoid(kScale * (x + 0.044715f * x * x * x));
    return {x * s, s + x * s * (1.f - s) * kScale * (1.f + 0.134145f * x * x)};
  } else {
    const float r = x <= 0.f ? 0.f : x;  // NaN stays
    return {r * r, 2.f * r};
  }
}

// ---- kernels ----

template <typename T, Access kAccess>
__device__ __forceinline__ void load_floats(float (&out)[kVec<T>], const void* rows, int64_t element) {
  unpack<T>(load<T, kAccess>(rows, element), out);
}

template <typename T, Access kAccess>
__device__ __forceinline__ void store_floats(void* rows, int64_t element, const float (&values)[kVec<T>]) {
  if constexpr (kAccess == Access::kVectors) {
    store<T>(rows, element, pack<T>(values));
  } else {
#pragma unroll
    for (int i = 0; i < kVec<T>; i++) static_cast<T*>(rows)[element + i] = from_float<T>(values[i]);
  }
}

template <typename T>
__device__ __forceinline__ float element(const void* rows, int64_t i) {
  return to_float(static_cast<const T*>(rows)[i]);
}

// Elements of this block's row: the last of rows that were cut may be shorter.
__device__ __forceinline__ int row_length(const ActivationParams& p, int64_t numel) {
  return static_cast<int>(min(p.N, numel - blockIdx.x * p.N));
}

template <typename T, Access kAccess, Activation kActivation, bool kGated>
__global__ void __launch_bounds__(kMaxThreads) activation_fwd_kernel(const ActivationParams p, const int64_t numel) {
  const int64_t x = blockIdx.x * p.x_stride, up = blockIdx.x * p.up_stride, y = blockIdx.x * p.out_stride;
  const int length = row_length(p, numel), full = length / kVec<T>;
  allow_successor();
  wait_for_predecessor();
#pragma unroll 2
  for (int v = threadIdx.x; v < full; v += blockDim.x) {
    const int i = v * kVec<T>;
    float xs[kVec<T>], ups[kVec<T>];
    load_floats<T, kAccess>(xs, p.x, x + i);
    if constexpr (kGated) load_floats<T, kAccess>(ups, p.up, up + i);
#pragma unroll
    for (int k = 0; k < kVec<T>; k++) xs[k] = activated<kActivation>(xs[k]).y * (kGated ? ups[k] : 1.f);
    store_floats<T, kAccess>(p.y, y + i, xs);
  }
  if (const int i = full * kVec<T> + static_cast<int>(threadIdx.x); i < length) {
    const float value = activated<kActivation>(element<T>(p.x, x + i)).y;
    static_cast<T*>(p.y)[y + i] = from_float<T>(kGated ? value * element<T>(p.up, up + i) : value);
  }
}

template <typename T, Access kAccess, Activation kActivation, bool kGated>
__global__ void __launch_bounds__(kMaxThreads) activation_bwd_kernel(const ActivationParams p, const int64_t numel) {
  const int64_t x = blockIdx.x * p.x_stride, up = blockIdx.x * p.up_stride, dy = blockIdx.x * p.dy_stride;
  const int64_t out = blockIdx.x * p.out_stride;
  const int length = row_length(p, numel), full = length / kVec<T>;
  allow_successor();
  wait_for_predecessor();
#pragma unroll 2
  for (int v = threadIdx.x; v < full; v += blockDim.x) {
    const int i = v * kVec<T>;
    float xs[kVec<T>], ups[kVec<T>], dys[kVec<T>];
    load_floats<T, kAccess>(xs, p.x, x + i);
    load_floats<T, kAccess>(dys, p.dy, dy + i);
    if constexpr (kGated) load_floats<T, kAccess>(ups, p.up, up + i);
#pragma unroll
    for (int k = 0; k < kVec<T>; k++) {
      const Activated a = activated<kActivation>(xs[k]);
      xs[k] = a.slope * dys[k] * (kGated ? ups[k] : 1.f);
      dys[k] *= a.y;
    }
    store_floats<T, kAccess>(p.y, out + i, xs);
    if constexpr (kGated) store_floats<T, kAccess>(p.dup, out + i, dys);
  }
  if (const int i = full * kVec<T> + static_cast<int>(threadIdx.x); i < length) {
    const Activated a = activated<kActivation>(element<T>(p.x, x + i));
    const float of_y = element<T>(p.dy, dy + i);
    static_cast<T*>(p.y)[out + i] = from_float<T>(a.slope * of_y * (kGated ? element<T>(p.up, up + i) : 1.f));
    if constexpr (kGated) static_cast<T*>(p.dup)[out + i] = from_float<T>(a.y * of_y);
  }
}

// ---- launchers ----

template <typename F>
void dispatch_activation(const ActivationParams& p, F&& f) {
  switch (p.activation) {
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>());
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>());
    case Activation::kRelu2:
      return f(std::integral_constant<Activation, Activation::kRelu2>());
  }
  throw std::invalid_argument("unknown activation");
}

// The same elements in rows of kFlatRow, if there are no gaps between rows.
ActivationParams flattened(ActivationParams p) {
  const auto no_gaps = [&](const void* rows, int64_t stride) { return !rows || p.M == 1 || stride == p.N; };
  if (!no_gaps(p.x, p.x_stride) || !no_gaps(p.up, p.up_stride) || !no_gaps(p.dy, p.dy_stride) ||
      !no_gaps(p.y, p.out_stride))
    return p;
  p.M = (p.M * p.N + kFlatRow - 1) / kFlatRow;
  p.N = p.x_stride = p.up_stride = p.dy_stride = p.out_stride = kFlatRow;
  return p;
}

// f(access, activation, gated, T()).
template <typename F>
void dispatch_all(const ActivationParams& p, F&& f) {
  dispatch_dtype(p.dtype, [&]<typename T>(T t) {
    const bool vectors = all_aligned(p.M, sizeof(T), {p.x_stride, p.up_stride, p.dy_stride, p.out_stride},
                                     {p.x, p.up, p.dy, p.y, p.dup});
    dispatch_activation(p, [&](auto activation) {
      dispatch_bool(p.up, [&](auto gated) {
        if (vectors)
          f(std::integral_constant<Access, Access::kVectors>(), activation, gated, t);
        else
          f(std::integral_constant<Access, Access::kElements>(), activation, gated, t);
      });
    });
  });
}

LaunchShape row_shape(const ActivationParams& p) {
  const int64_t vecs = p.N * size_of(p.dtype) / 16;
  const unsigned threads = std::clamp<int64_t>((vecs / 2 + 31) / 32 * 32, 32, kMaxThreads);
  return {.grid = dim3(static_cast<unsigned>(p.M)), .threads = dim3(threads), .dependent = true};
}

}  // namespace

void activation_fwd(const ActivationParams& params, cudaStream_t stream) {
  NVTX_FN();
  const int64_t numel = params.M * params.N;
  if (numel == 0) return;
  const ActivationParams p = flattened(params);
  dispatch_all(p, [&]<typename T>(auto access, auto activation, auto gated, T) {
    launch<activation_fwd_kernel<T, access.value, activation.value, gated.value>>(row_shape(p), stream, p, numel);
  });
}

void activation_bwd(const ActivationParams& params, cudaStream_t stream) {
  NVTX_FN();
  const int64_t numel = params.M * params.N;
  if (numel == 0) return;
  const ActivationParams p = flattened(params);
  dispatch_all(p, [&]<typename T>(auto access, auto activation, auto gated, T) {
    launch<activation_bwd_kernel<T, access.value, activation.value, gated.value>>(row_shape(p), stream, p, numel);
  });
}

}  // namespace cs336::cuda
