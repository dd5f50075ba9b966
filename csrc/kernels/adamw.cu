// AdamW over a list of tensors in one launch. The list travels by value in the kernel's parameters (32764 bytes since
// CUDA 12.1), so nothing is copied to the device first; a block finds its tensor by binary search.
#include "common/check.h"
#include "common/dispatch.h"
#include "common/nvtx.h"
#include "common/rounding.h"
#include "kernels/adamw.h"

namespace cs336::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 4;                  // elements a thread moves at once: 16 bytes of fp32, 8 of a 16-bit dtype
constexpr int kChunk = kThreads * kPack;  // elements of a block: 4.22 TB/s, and 4.12 with four times as many (H200)
constexpr int kMaxTensors = 544;          // as many as fit

struct AdamwTable {
  void* p[kMaxTensors];
  const void* g[kMaxTensors];
  float* m[kMaxTensors];
  float* v[kMaxTensors];
  const float* step[kMaxTensors];
  int16_t* remainder[kMaxTensors];
  int64_t numel[kMaxTensors];
  uint32_t first_chunk[kMaxTensors];  // ascending; tensor i owns chunks first_chunk[i] .. first_chunk[i + 1] - 1
  int num_tensors;
  AdamwHyper hyper;
};
static_assert(sizeof(AdamwTable) <= 32764, "kernel parameters end at 32764 bytes");

// ---- kernels ----

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
  T x[kWidth];
};

__device__ int find_tensor(const AdamwTable& table, uint32_t chunk) {
  int low = 0;
  for (int high = table.num_tensors; high - low > 1;) {
    const int mid = (low + high) / 2;
    (table.first_chunk[mid] <= chunk ? low : high) = mid;
  }
  return low;
}

template <int kWidth, typename... T>
__device__ bool aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % alignof(Pack<T, kWidth>) == 0) && ...);
}

template <int kWidth, bool kRemainder, typename P, typename G>
__device__ __forceinline__ void update(P* p, int16_t* remainder, const G* g, float* m, float* v, float scale,
                                       const AdamwHyper& hyper, const AdamwCoefficients& coefficients) {
  using Remainders = Pack<int16_t, kWidth>;
  auto& p_pack = *reinterpret_cast<Pack<P, kWidth>*>(p);
  auto& m_pack = *reinterpret_cast<Pack<float, kWidth>*>(m);
  auto& v_pack = *reinterpret_cast<Pack<float, kWidth>*>(v);
  const auto g_k = *reinterpret_cast<const Pack<G, kWidth>*>(g);
  auto p_k = p_pack;
  auto m_k = m_pack, v_k = v_pack;
  Remainders r_k{};
  if constexpr (kRemainder) r_k = *reinterpret_cast<const Remainders*>(remainder);
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    float x;
    if constexpr (kRemainder)
      x = join(p_k.x[k], r_k.x[k]);
    else
      x = float(p_k.x[k]);
    adamw_update(x, float(g_k.x[k]), scale, m_k.x[k], v_k.x[k], hyper, coefficients);
    if constexpr (kRemainder)
      split(x, p_k.x[k], r_k.x[k]);
    else
      p_k.x[k] = P(x);
  }
  if constexpr (kRemainder) *reinterpret_cast<Remainders*>(remainder) = r_k;
  p_pack = p_k;
  m_pack = m_k;
  v_pack = v_k;
}

template <typename P, typename G, bool kRemainder>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ AdamwTable table) {
  const int t = find_tensor(table, blockIdx.x);
  const int64_t start = static_cast<int64_t>(blockIdx.x - table.first_chunk[t]) * kChunk;
  const int n = static_cast<int>(min(table.numel[t] - start, static_cast<int64_t>(kChunk)));
  P* p = static_cast<P*>(table.p[t]) + start;
  int16_t* remainder = kRemainder ? table.remainder[t] + start : nullptr;
  const G* g = static_cast<const G*>(table.g[t]) + start;
  float* m = table.m[t] + start;
  float* v = table.v[t] + start;
  const AdamwHyper& hyper = table.hyper;
  const float scale = hyper.grad_scale ? *hyper.grad_scale : 1.f;
  __shared__ AdamwCoefficients shared;  // float64 is slow on most GPUs: once a block
  if (threadIdx.x == 0) shared = adamw_coefficients(hyper, *hyper.lr, *table.step[t]);
  __syncthreads();
  const AdamwCoefficients coefficients = shared;

  const int packed = aligned<kPack>(p, remainder, g, m, v) ? n / kPack * kPack : 0;
  for (int i = threadIdx.x * kPack; i < packed; i += kThreads * kPack)
    update<kPack, kRemainder>(p + i, remainder + i, g + i, m + i, v + i, scale, hyper, coefficients);
  for (int i = packed + threadIdx.x; i < n; i += kThreads)
    update<1, kRemainder>(p + i, remainder + i, g + i, m + i, v + i, scale, hyper, coefficients);
}

// ---- launchers ----

template <typename P, typename G, bool kRemainder>
void launch(AdamwTable& table, uint32_t num_chunks, cudaStream_t stream) {
  if (num_chunks == 0) return;
  adamw_kernel<P, G, kRemainder><<<num_chunks, kThreads, 0, stream>>>(table);
  CUDA_CHECK(cudaGetLastError());
  table.num_tensors = 0;
}

template <typename P, typename G, bool kRemainder>
void adamw_of(Dtype p_dtype, Dtype g_dtype, std::span<const AdamwTensor> tensors, AdamwTable& table,
              cudaStream_t stream) {
  constexpr uint32_t kMaxChunks = 0x7fffffff;  // of a grid
  uint32_t num_chunks = 0;
  for (const AdamwTensor& tensor : tensors) {
    if (tensor.p_dtype != p_dtype || tensor.g_dtype != g_dtype || (tensor.remainder != nullptr) != kRemainder) continue;
    const int64_t chunks = (tensor.numel + kChunk - 1) / kChunk;
    if (table.num_tensors == kMaxTensors || num_chunks + chunks > kMaxChunks) {
      launch<P, G, kRemainder>(table, num_chunks, stream);
      num_chunks = 0;
    }
    const int i = table.num_tensors++;
    table.p[i] = tensor.p;
    table.g[i] = tensor.g;
    table.m[i] = tensor.m;
    table.v[i] = tensor.v;
    table.step[i] = tensor.step;
    table.remainder[i] = tensor.remainder;
    table.numel[i] = tensor.numel;
    table.first_chunk[i] = num_chunks;
    num_chunks += static_cast<uint32_t>(chunks);
  }
  launch<P, G, kRemainder>(table, num_chunks, stream);
}

}  // namespace

void adamw(std::span<const AdamwTensor> tensors, const AdamwHyper& hyper, cudaStream_t stream) {
  NVTX_FN();
  AdamwTable table;
  table.num_tensors = 0;
  table.hyper = hyper;
  constexpr Dtype kDtypes[] = {Dtype::F32, Dtype::F16, Dtype::BF16};
  for (const Dtype p_dtype : kDtypes) {
    for (const Dtype g_dtype : kDtypes) {
      dispatch_dtype(p_dtype, [&]<typename P>(P) {
        dispatch_dtype(g_dtype, [&]<typename G>(G) {
          adamw_of<P, G, false>(p_dtype, g_dtype, tensors, table, stream);
          if constexpr (std::is_same_v<P, __nv_bfloat16>)
            adamw_of<P, G, true>(p_dtype, g_dtype, tensors, table, stream);
        });
      });
    }
  }
}

}  // namespace cs336::cuda
