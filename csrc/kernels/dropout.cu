// Dropout by a counter: a thread makes the words of its elements, so nothing but x is read and nothing but y is
// written.
#include <algorithm>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/nvtx.h"
#include "common/vec.cuh"
#include "kernels/dropout.h"

namespace cs336::cuda {
namespace {

constexpr int kThreads = 256;

// Philox-4x32-10, Salmon et al. 2011.
__device__ __forceinline__ uint4 philox(uint64_t counter, uint64_t seed) {
  uint4 s = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint2 key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; round++) {
    constexpr uint32_t kA = 0xD2511F53, kB = 0xCD9E8D57;
    s = {__umulhi(kB, s.z) ^ s.y ^ key.x, kB * s.z, __umulhi(kA, s.x) ^ s.w ^ key.y, kA * s.x};
    key.x += 0x9E3779B9;
    key.y += 0xBB67AE85;
  }
  return s;
}

// Elements first to first + 3.
struct Words {
  uint32_t word[4];
  __device__ __forceinline__ Words(int64_t first, uint64_t seed) {
    const uint4 made = philox(first / 4, seed);
    word[0] = made.x, word[1] = made.y, word[2] = made.z, word[3] = made.w;
  }
};

__device__ __forceinline__ float dropped(float x, uint32_t word, const DropoutParams& p) {
  return word >= p.below ? x * p.scale : 0.f;
}

// ---- kernels ----

template <typename T, bool kResidual>
__global__ void __launch_bounds__(kThreads) dropout_fwd_kernel(const DropoutParams p) {
  allow_successor();
  wait_for_predecessor();
  const uint64_t seed = *p.seed;
  const int64_t i = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * kVec<T>;
  if (i + kVec<T> > p.numel) return;
  float x[kVec<T>], residual[kVec<T>];
  unpack<T>(load<T>(p.x, i), x);
  if constexpr (kResidual) unpack<T>(load<T>(p.residual, i), residual);
#pragma unroll
  for (int k = 0; k < kVec<T>; k += 4) {
    const Words words(i + k, seed);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      x[k + j] = dropped(x[k + j], words.word[j], p);
      if constexpr (kResidual) x[k + j] += residual[k + j];
    }
  }
  store<T>(p.y, i, pack<T>(x));
}

// From element `first` on, which is a multiple of four: a thread takes four.
template <typename T, bool kResidual>
__global__ void __launch_bounds__(kThreads) dropout_fwd_any_kernel(const DropoutParams p, const int64_t first) {
  allow_successor();
  wait_for_predecessor();
  const int64_t i = first + (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * 4;
  if (i >= p.numel) return;
  const Words words(i, *p.seed);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if (i + j >= p.numel) return;
    float y = dropped(to_float(static_cast<const T*>(p.x)[i + j]), words.word[j], p);
    if constexpr (kResidual) y += to_float(static_cast<const T*>(p.residual)[i + j]);
    static_cast<T*>(p.y)[i + j] = from_float<T>(y);
  }
}

// ---- launchers ----

LaunchShape shape_of(int64_t threads) {
  const unsigned blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  return {.grid = dim3(blocks), .threads = dim3(kThreads), .dependent = true};
}

template <typename T, bool kResidual>
void dropout_fwd(const DropoutParams& p, cudaStream_t stream) {
  const bool aligned = all_aligned(1, sizeof(T), {}, {p.x, p.residual, p.y});
  const int64_t vecs = aligned ? p.numel / kVec<T> : 0, rest = p.numel - vecs * kVec<T>;
  if (vecs > 0) launch<dropout_fwd_kernel<T, kResidual>>(shape_of(vecs), stream, p);
  if (rest > 0) launch<dropout_fwd_any_kernel<T, kResidual>>(shape_of((rest + 3) / 4), stream, p, vecs * kVec<T>);
}

}  // namespace

void dropout_fwd(const DropoutParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.numel == 0) return;
  dispatch_dtype(p.dtype, [&]<typename T>(T) {
    dispatch_bool(p.residual, [&](auto residual) { dropout_fwd<T, residual.value>(p, stream); });
  });
}

}  // namespace cs336::cuda
