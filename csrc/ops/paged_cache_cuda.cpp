// torch.ops.cs336.append_kv_ and copy_pages_ on CUDA: check, guard, launch.
#include "ops/paged_cache.h"

#include "kernels/paged_cache.h"

namespace cs336 {
namespace {

PagedBytes bytes_of(const Tensor& t) {
  const int64_t size = size_of(dtype_of(t, "cache")), d = t.dim();
  return {.data = static_cast<char*>(data_of(t)),
          .page_stride = d == 4 ? t.stride(0) * size : 0,
          .token_stride = t.stride(d - 3) * size,
          .head_stride = t.stride(d - 2) * size,
          .bytes = static_cast<int>(t.size(d - 1) * size)};
}

void append_kv_op(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                  const Tensor& page_table, const Tensor& sequences, const Tensor& positions) {
  check_append(k_cache, v_cache, k, v, page_table, sequences, positions);
  if (k.size(0) == 0) return;
  torch::stable::accelerator::DeviceGuard guard(k_cache.get_device_index());
  append_kv({.caches = {bytes_of(k_cache), bytes_of(v_cache)},
             .rows = {bytes_of(k), bytes_of(v)},
             .page_table = ints(page_table),
             .sequences = ints(sequences),
             .positions = ints(positions),
             .table_stride = page_table.stride(0),
             .tokens = k.size(0),
             .heads = static_cast<int>(k.size(1)),
             .num_pages = static_cast<int>(k_cache.size(0)),
             .page_size = static_cast<int>(k_cache.size(1)),
             .table_rows = static_cast<int>(page_table.size(0)),
             .table_width = static_cast<int>(page_table.size(1))},
            current_stream(k_cache));
}

void copy_pages_op(const Tensor& cache, const Tensor& sources, const Tensor& targets) {
  check_cache(cache, "cache");
  check_index(sources, "sources", sources.numel(), cache);
  check_index(targets, "targets", sources.numel(), cache);
  if (sources.size(0) == 0) return;
  torch::stable::accelerator::DeviceGuard guard(cache.get_device_index());
  copy_pages({.cache = bytes_of(cache),
              .sources = ints(sources),
              .targets = ints(targets),
              .pairs = sources.size(0),
              .heads = static_cast<int>(cache.size(2)),
              .num_pages = static_cast<int>(cache.size(0)),
              .page_size = static_cast<int>(cache.size(1))},
             current_stream(cache));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) {
  m.impl("append_kv_", TORCH_BOX(&append_kv_op));
  m.impl("copy_pages_", TORCH_BOX(&copy_pages_op));
}

}  // namespace cs336
