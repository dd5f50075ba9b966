// AdamW on a shard of a flat bucket, and the squares of its gradients. A block updates 1024 elements of one parameter;
// its step, whether it is used, the learning rate and the gradient's scale are read on the device.
#include <algorithm>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/nvtx.h"
#include "common/rounding.h"
#include "common/vec.cuh"
#include "kernels/sharded_adamw.h"

namespace cs336::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 4;                  // elements a thread moves: 16 bytes of float32
constexpr int kChunk = kThreads * kPack;  // elements of a block: 4.22 TB/s, and 4.12 with four times as many (H200)
constexpr int kMaxPieces = 128;  // of a launch: its parameters stay below 4 KB, what a launch costs grows beyond

struct Table {
  ShardedAdamwParams p;
  AdamwHyper hyper;
  Piece pieces[kMaxPieces];
  uint32_t first_chunk[kMaxPieces];  // ascending; piece i owns chunks first_chunk[i] .. first_chunk[i + 1] - 1
  int num_pieces;
};
static_assert(sizeof(Table) <= 4096);

// ---- kernels ----

template <typename T>
struct alignas(kPack * sizeof(T)) Pack {
  T x[kPack];
};

__device__ int find_piece(const Table& table, uint32_t chunk) {
  int low = 0;
  for (int high = table.num_pieces; high - low > 1;) {
    const int mid = (low + high) / 2;
    (table.first_chunk[mid] <= chunk ? low : high) = mid;
  }
  return low;
}

template <typename P, bool kRemainder>
__global__ void __launch_bounds__(kThreads) sharded_adamw_kernel(const __grid_constant__ Table table) {
  const int which = find_piece(table, blockIdx.x);
  const Piece piece = table.pieces[which];
  if (!(table.p.used[piece.parameter] > 0.f)) return;
  const float scale = table.hyper.grad_scale ? *table.hyper.grad_scale : 1.f;
  __shared__ AdamwCoefficients shared;  // float64 is slow on most GPUs: once a block
  if (threadIdx.x == 0) shared = adamw_coefficients(table.hyper, *table.hyper.lr, table.p.steps[piece.parameter]);
  __syncthreads();
  const AdamwCoefficients coefficients = shared;

  const int64_t first = piece.begin + static_cast<int64_t>(blockIdx.x - table.first_chunk[which]) * kChunk;
  const int64_t i = first + threadIdx.x * kPack;
  if (i >= piece.end) return;
  auto& p_pack = *reinterpret_cast<Pack<P>*>(static_cast<P*>(table.p.p) + i);
  auto& m_pack = *reinterpret_cast<Pack<float>*>(table.p.m + i);
  auto& v_pack = *reinterpret_cast<Pack<float>*>(table.p.v + i);
  const auto g_k = *reinterpret_cast<const Pack<P>*>(static_cast<const P*>(table.p.g) + i);
  auto p_k = p_pack;
  auto m_k = m_pack, v_k = v_pack;
  Pack<int16_t> remainder_k;
  if constexpr (kRemainder) remainder_k = *reinterpret_cast<Pack<int16_t>*>(table.p.remainder + i);
#pragma unroll
  for (int k = 0; k < kPack; k++) {
    float x;
    if constexpr (kRemainder)
      x = join(p_k.x[k], remainder_k.x[k]);
    else
      x = float(p_k.x[k]);
    adamw_update(x, float(g_k.x[k]), scale, m_k.x[k], v_k.x[k], table.hyper, coefficients);
    if constexpr (kRemainder)
      split(x, p_k.x[k], remainder_k.x[k]);
    else
      p_k.x[k] = P(x);
  }
  p_pack = p_k;
  m_pack = m_k;
  v_pack = v_k;
  if constexpr (kRemainder) *reinterpret_cast<Pack<int16_t>*>(table.p.remainder + i) = remainder_k;
}

// Of all threads of the block, in thread 0.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kThreads / 32; warp++) total += sums[warp];
  return total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_squares_kernel(const T* x, int64_t numel, double* squares) {
  constexpr int64_t kStride = static_cast<int64_t>(kSquares) * kThreads * kVec<T>;
  double sum = 0;
  for (int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kVec<T>; i < numel; i += kStride) {
    float values[kVec<T>];
    unpack<T>(load<T>(x, i), values);
#pragma unroll
    for (int k = 0; k < kVec<T>; k++) sum = fma(double{values[k]}, double{values[k]}, sum);
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) squares[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) sum_partials_kernel(const double* x, int64_t numel, float* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < numel; i += kThreads) sum += x[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *total = static_cast<float>(sum);
}

// ---- launchers ----

template <typename P, bool kRemainder>
void update_pieces(Table& table, cudaStream_t stream) {
  std::span<const Piece> rest = table.p.pieces;
  while (!rest.empty()) {
    uint32_t num_chunks = 0;  // a shard has at most 2^31 - 1 of them: 2 Ti elements
    table.num_pieces = static_cast<int>(std::min<size_t>(rest.size(), kMaxPieces));
    for (int i = 0; i < table.num_pieces; i++) {
      table.pieces[i] = rest[i];
      table.first_chunk[i] = num_chunks;
      num_chunks += static_cast<uint32_t>((rest[i].end - rest[i].begin + kChunk - 1) / kChunk);
    }
    sharded_adamw_kernel<P, kRemainder><<<num_chunks, kThreads, 0, stream>>>(table);
    CUDA_CHECK(cudaGetLastError());
    rest = rest.subspan(table.num_pieces);
  }
}

}  // namespace

void sharded_adamw(const ShardedAdamwParams& p, const AdamwHyper& hyper, cudaStream_t stream) {
  NVTX_FN();
  Table table;
  table.p = p;
  table.hyper = hyper;
  if (p.dtype == Dtype::F32 && !p.remainder)
    update_pieces<float, false>(table, stream);
  else if (p.dtype == Dtype::BF16 && !p.remainder)
    update_pieces<__nv_bfloat16, false>(table, stream);
  else if (p.dtype == Dtype::BF16)
    update_pieces<__nv_bfloat16, true>(table, stream);
  else
    throw std::invalid_argument("a shard is bfloat16, or float32 without remainder");
}

void sum_squares(const void* x, int64_t numel, Dtype dtype, double* squares, cudaStream_t stream) {
  NVTX_FN();
  if (dtype == Dtype::F32)
    sum_squares_kernel<<<kSquares, kThreads, 0, stream>>>(static_cast<const float*>(x), numel, squares);
  else if (dtype == Dtype::BF16)
    sum_squares_kernel<<<kSquares, kThreads, 0, stream>>>(static_cast<const __nv_bfloat16*>(x), numel, squares);
  else
    throw std::invalid_argument("a shard is float32 or bfloat16");
  CUDA_CHECK(cudaGetLastError());
}

void sum_partials(const double* x, int64_t numel, float* total, cudaStream_t stream) {
  NVTX_FN();
  sum_partials_kernel<<<1, kThreads, 0, stream>>>(x, numel, total);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace cs336::cuda
