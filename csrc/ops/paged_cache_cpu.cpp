// torch.ops.cs336.append_kv_ and copy_pages_ on CPU.
#include <algorithm>
#include <cstring>

#include "ops/paged_cache.h"

namespace cs336 {
namespace {

constexpr int64_t kGrain = 65536;  // bytes worth a thread

// Heads of one token: `to` and `from` have their own strides, in bytes.
void copy_token(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t heads, int64_t bytes) {
  for (int64_t h = 0; h < heads; h++) std::memcpy(to + h * to_stride, from + h * from_stride, bytes);
}

void append_kv_op(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                  const Tensor& page_table, const Tensor& sequences, const Tensor& positions) {
  check_append(k_cache, v_cache, k, v, page_table, sequences, positions);
  const int64_t T = k.size(0), H = k.size(1), page = k_cache.size(1), size = size_of(dtype_of(k, "k"));
  const auto page_of = [&](int64_t t) {
    return ints(page_table)[ints(sequences)[t] * page_table.stride(0) + ints(positions)[t] / page];
  };
  for (int64_t t = 0; t < T; t++) {
    if (ints(positions)[t] < 0) continue;
    STD_TORCH_CHECK(ints(sequences)[t] >= 0 && ints(sequences)[t] < page_table.size(0),
                    "sequences must be rows of page_table, from 0 to ", page_table.size(0) - 1);
    STD_TORCH_CHECK(ints(positions)[t] < page_table.size(1) * page, "positions must be below ", page_table.size(1),
                    " pages of ", page, " tokens");
    STD_TORCH_CHECK(page_of(t) >= 0 && page_of(t) < k_cache.size(0), "page_table must hold pages from 0 to ",
                    k_cache.size(0) - 1, " where tokens are written, got ", page_of(t));
  }
  const auto copy = [&](const Tensor& cache, const Tensor& rows, int64_t t) {
    char* to = static_cast<char*>(data_of(cache)) +
               (page_of(t) * cache.stride(0) + ints(positions)[t] % page * cache.stride(1)) * size;
    copy_token(to, cache.stride(2) * size, static_cast<const char*>(data_of(rows)) + t * rows.stride(0) * size,
               rows.stride(1) * size, H, rows.size(2) * size);
  };
  torch::stable::parallel_for(0, T, std::max<int64_t>(1, kGrain / (H * k.size(2) * size)),
                              [&](int64_t first, int64_t last) {
                                for (int64_t t = first; t < last; t++) {
                                  if (ints(positions)[t] < 0) continue;
                                  copy(k_cache, k, t);
                                  copy(v_cache, v, t);
                                }
                              });
}

void copy_pages_op(const Tensor& cache, const Tensor& sources, const Tensor& targets) {
  check_cache(cache, "cache");
  check_index(sources, "sources", sources.numel(), cache);
  check_index(targets, "targets", sources.numel(), cache);
  const int64_t page = cache.size(1), size = size_of(dtype_of(cache, "cache"));
  for (int64_t n = 0; n < sources.size(0); n++)
    STD_TORCH_CHECK(ints(sources)[n] < cache.size(0) && ints(targets)[n] < cache.size(0),
                    "sources and targets must be below ", cache.size(0), " pages");
  char* data = static_cast<char*>(data_of(cache));
  torch::stable::parallel_for(0, sources.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      const int64_t source = ints(sources)[n], target = ints(targets)[n], step = cache.stride(2) * size;
      if (source < 0 || target < 0) continue;
      for (int64_t t = 0; t < page; t++) {
        const auto at = [&](int64_t p) { return data + (p * cache.stride(0) + t * cache.stride(1)) * size; };
        copy_token(at(target), step, at(source), step, cache.size(2), cache.size(3) * size);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CPU, m) {
  m.impl("append_kv_", TORCH_BOX(&append_kv_op));
  m.impl("copy_pages_", TORCH_BOX(&copy_pages_op));
}

}  // namespace cs336
