// The largest magnitude of x, then tiles of x that are read once, rounded, and written as they are and transposed.
#include <cuda_fp8.h>

#include <algorithm>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/nvtx.h"
#include "common/vec.cuh"
#include "kernels/fp8_copies.h"

namespace cs336::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kLoads = 4;        // of 16 bytes that a thread has under way
constexpr int kBlocksPerSM = 2;  // 1024 threads of each kernel
constexpr int kTile = 128;       // rows and columns
constexpr int kPitch = kTile / 4 + 1;
constexpr float kLeast = 1e-12f;  // what takes the place of a smaller largest magnitude

// Bits of magnitudes are ordered as they are, and those of NaN are the largest.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Of the whole block, for all its threads.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warps[kWarps];
  value = __reduce_max_sync(~0u, value);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(~0u, of_warps[threadIdx.x % kWarps]);
}

template <typename X>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    largest_kernel(const X* x, int64_t vectors, uint32_t* largest) {
  wait_for_predecessor();
  allow_successor();  // who reads x at once: it is there when all blocks have come so far
  uint32_t found = 0;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x; first < vectors; first += kLoads * step) {
    uint4 packed[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++)
      packed[i] = first + i * step < vectors ? load<X>(x, (first + i * step) * kVec<X>) : uint4{0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      float values[kVec<X>];
      unpack<X>(packed[i], values);
#pragma unroll
      for (int j = 0; j < kVec<X>; j++) found = max(found, magnitude(values[j]));
    }
  }
  found = block_max(found);
  if (threadIdx.x == 0) largest[blockIdx.x] = found;
}

// Four neighbours.
template <typename X>
__device__ __forceinline__ void load_four(float (&out)[4], const X* x) {
  if constexpr (sizeof(X) == 4) {
    unpack<X>(load<X>(x, 0), out);
  } else {
    const uint2 packed = *reinterpret_cast<const uint2*>(x);
    float all[kVec<X>];
    unpack<X>(uint4{packed.x, packed.y, 0, 0}, all);
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = all[i];
  }
}

template <__nv_fp8_interpretation_t kFormat>
__device__ __forceinline__ uint32_t round_four(const float (&x)[4], float factor) {
  const auto pair = [&](int i) -> uint32_t {
    return __nv_cvt_float2_to_fp8x2({x[i] * factor, x[i + 1] * factor}, __NV_SATFINITE, kFormat);
  };
  return pair(0) | pair(2) << 16;
}

// t[c] becomes t[(c + by) % 4].
__device__ __forceinline__ void rotate(uint32_t (&t)[4], int by) {
  const uint32_t u[4] = {by & 1 ? t[1] : t[0], by & 1 ? t[2] : t[1], by & 1 ? t[3] : t[2], by & 1 ? t[0] : t[3]};
#pragma unroll
  for (int c = 0; c < 4; c++) t[c] = by & 2 ? u[(c + 2) % 4] : u[c];
}

// A thread rounds four rows by four columns at a time: four words of a row each, which memory gets at once, and, with
// their bytes exchanged, four words of a column each, which it gets by way of shared memory. A warp has the columns of
// a tile side by side. The last rows come first: L2 has seen them last.
template <typename X, __nv_fp8_interpretation_t kFormat>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    copies_kernel(const Fp8CopiesParams p, int parts, float most) {
  __shared__ uint32_t columns[kTile][kPitch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = int64_t{gridDim.y - 1 - blockIdx.y} * kTile, column0 = int64_t{blockIdx.x} * kTile;
  const int64_t column = column0 + 4 * lane;
  float x[kTile / 4 / kWarps][4][4] = {};
#pragma unroll
  for (int i = 0; i < kTile / 4 / kWarps; i++)
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int64_t row = row0 + 4 * (warp + i * kWarps) + r;
      if (row < p.rows && column < p.columns) load_four(x[i][r], static_cast<const X*>(p.x) + row * p.columns + column);
    }
  wait_for_predecessor();
  allow_successor();
  uint32_t found = 0;
  for (int i = threadIdx.x; i < parts; i += kThreads) found = max(found, p.largest[i]);
  float largest = __uint_as_float(block_max(found));
  if (largest < kLeast) largest = kLeast;  // and NaN stays
  const float factor = __fdiv_rn(most, largest);
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0) *p.scale = __fdiv_rn(largest, most);
#pragma unroll
  for (int i = 0; i < kTile / 4 / kWarps; i++) {
    const int four = warp + i * kWarps;
    const int64_t row = row0 + 4 * four;
    uint32_t w[4];
#pragma unroll
    for (int r = 0; r < 4; r++) w[r] = round_four<kFormat>(x[i][r], factor);
    if (row < p.rows && column < p.columns)
#pragma unroll
      for (int r = 0; r < 4; r++) reinterpret_cast<uint32_t*>(p.rounded)[((row + r) * p.columns + column) / 4] = w[r];
    const uint32_t low01 = __byte_perm(w[0], w[1], 0x5140), high01 = __byte_perm(w[0], w[1], 0x7362);
    const uint32_t low23 = __byte_perm(w[2], w[3], 0x5140), high23 = __byte_perm(w[2], w[3], 0x7362);
    uint32_t t[4] = {__byte_perm(low01, low23, 0x5410), __byte_perm(low01, low23, 0x7632),
                     __byte_perm(high01, high23, 0x5410), __byte_perm(high01, high23, 0x7632)};
    // Lanes 8 apart would meet in a bank: each quarter of a warp begins with another column.
    rotate(t, lane / 8);
#pragma unroll
    for (int c = 0; c < 4; c++) columns[4 * lane + (c + lane / 8) % 4][four] = t[c];
  }
  __syncthreads();
  const int64_t turned_row = row0 + 4 * lane;
  for (int c = warp; c < kTile; c += kWarps)
    if (column0 + c < p.columns && turned_row < p.rows)
      reinterpret_cast<uint32_t*>(p.turned)[((column0 + c) * p.rows + turned_row) / 4] = columns[c][lane];
}

}  // namespace

void fp8_copies(const Fp8CopiesParams& p, cudaStream_t stream) {
  NVTX_FN();
  const int64_t bytes = p.rows * p.columns * size_of(p.x_dtype), vectors = bytes / 16;
  const int64_t blocks = std::min<int64_t>((vectors + kThreads * kLoads - 1) / (kThreads * kLoads),
                                           std::min(kFp8Parts, current_device().num_sms * kBlocksPerSM));
  const auto parts = static_cast<int>(std::max<int64_t>(blocks, 1));
  const auto tiles = [](int64_t size) { return static_cast<unsigned>((size + kTile - 1) / kTile); };
  const LaunchShape look{.grid = dim3(static_cast<unsigned>(parts)), .threads = dim3(kThreads), .dependent = true};
  const LaunchShape copy{.grid = dim3(tiles(p.columns), tiles(p.rows)), .threads = dim3(kThreads), .dependent = true};
  dispatch_dtype(p.x_dtype, [&]<typename X>(X) {
    launch<largest_kernel<X>>(look, stream, static_cast<const X*>(p.x), vectors, p.largest);
    if (p.dtype == Dtype::F8E5M2)
      launch<copies_kernel<X, __NV_E5M2>>(copy, stream, p, parts, 57344.f);
    else
      launch<copies_kernel<X, __NV_E4M3>>(copy, stream, p, parts, 448.f);
  });
}

}  // namespace cs336::cuda
