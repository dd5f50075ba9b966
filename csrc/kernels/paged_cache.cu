// A thread copies one unit, the widest that all rows are multiples of: what it copies and where to comes from loads
// that depend on each other, so that the more threads wait at once the better.
#include "kernels/paged_cache.h"

#include <algorithm>
#include <initializer_list>

#include "common/launch.h"
#include "common/nvtx.h"

namespace cs336 {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ char* at(const PagedBytes& x, int64_t page, int64_t token, int head) {
  return x.data + page * x.page_stride + token * x.token_stride + head * x.head_stride;
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) append_kv_kernel(const __grid_constant__ AppendKvParams p) {
  const PagedBytes &cache = p.caches[blockIdx.y], &rows = p.rows[blockIdx.y];
  const int units = rows.bytes / static_cast<int>(sizeof(Unit));
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = index / units, token = row / p.heads;
  if (token >= p.tokens) return;
  const int position = p.positions[token], sequence = p.sequences[token], entry = position / p.page_size;
  if (position < 0 || entry >= p.table_width || sequence < 0 || sequence >= p.table_rows) return;
  const int page = p.page_table[sequence * p.table_stride + entry];
  if (page < 0 || page >= p.num_pages) return;
  const int head = static_cast<int>(row % p.heads), unit = static_cast<int>(index % units);
  reinterpret_cast<Unit*>(at(cache, page, position % p.page_size, head))[unit] =
      reinterpret_cast<const Unit*>(at(rows, 0, token, head))[unit];
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) copy_pages_kernel(const __grid_constant__ CopyPagesParams p) {
  const int units = p.cache.bytes / static_cast<int>(sizeof(Unit));
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = index / units, token = row / p.heads;
  const int64_t pair = token / p.page_size;
  if (pair >= p.pairs) return;
  const int source = p.sources[pair], target = p.targets[pair];
  if (source < 0 || source >= p.num_pages || target < 0 || target >= p.num_pages) return;
  const int head = static_cast<int>(row % p.heads), unit = static_cast<int>(index % units);
  reinterpret_cast<Unit*>(at(p.cache, target, token % p.page_size, head))[unit] =
      reinterpret_cast<const Unit*>(at(p.cache, source, token % p.page_size, head))[unit];
}

// f(Unit()) with the widest unit that addresses, strides and rows are multiples of.
template <typename F>
void dispatch_unit(std::initializer_list<const PagedBytes*> tensors, F&& f) {
  uint64_t all = 16;
  for (const PagedBytes* x : tensors)
    all |= reinterpret_cast<uint64_t>(x->data) | x->page_stride | x->token_stride | x->head_stride | x->bytes;
  if (all % 16 == 0) return f(uint4());
  if (all % 4 == 0) return f(uint32_t());
  if (all % 2 == 0) return f(uint16_t());
  f(uint8_t());
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

void append_kv(const AppendKvParams& p, cudaStream_t stream) {
  NVTX_FN();
  dispatch_unit({&p.caches[0], &p.caches[1], &p.rows[0], &p.rows[1]}, [&]<typename Unit>(Unit) {
    const int64_t units = std::max(p.rows[0].bytes, p.rows[1].bytes) / sizeof(Unit);
    launch<append_kv_kernel<Unit>>({.grid = dim3(blocks_for(p.tokens * p.heads * units), 2), .threads = dim3(kThreads)},
                                   stream, p);
  });
}

void copy_pages(const CopyPagesParams& p, cudaStream_t stream) {
  NVTX_FN();
  dispatch_unit({&p.cache}, [&]<typename Unit>(Unit) {
    const int64_t rows = p.pairs * p.page_size * p.heads, units = p.cache.bytes / sizeof(Unit);
    launch<copy_pages_kernel<Unit>>({.grid = dim3(blocks_for(rows * units)), .threads = dim3(kThreads)}, stream, p);
  });
}

}  // namespace cs336
