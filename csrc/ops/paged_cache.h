// What the paged cache's ops refuse on every device.
#pragma once
#include "ops/tensor.h"

namespace cs336 {

inline void check_index(const Tensor& t, const char* name, int64_t length, const Tensor& cache) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == length, name, " must have shape (", length, ",)");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, name, " must be int32");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  check_device(t, name, cache);
}

// (pages, tokens of a page, heads, features), the last dim contiguous.
inline void check_cache(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dims (pages, tokens of a page, heads, features), got ", t.dim());
  for (int64_t d = 1; d < 4; d++) STD_TORCH_CHECK(t.size(d) >= 1, name, " must have at least one entry in dim ", d);
  STD_TORCH_CHECK(t.size(3) == 1 || t.stride(3) == 1, name, " must be contiguous in its last dim");
  STD_TORCH_CHECK(t.size(0) < int64_t{1} << 31 && t.size(1) < int64_t{1} << 31, name,
                  " must have fewer than 2^31 pages");
}

inline void check_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                         const Tensor& page_table, const Tensor& sequences, const Tensor& positions) {
  check_cache(k_cache, "k_cache");
  check_cache(v_cache, "v_cache");
  for (int64_t d = 0; d < 3; d++)
    STD_TORCH_CHECK(v_cache.size(d) == k_cache.size(d), "v_cache must have the pages, tokens and heads of k_cache");
  check_device(v_cache, "v_cache", k_cache);
  const auto check_rows_like_cache = [&](const Tensor& x, const char* name, const Tensor& cache) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == k.size(0) && x.size(1) == cache.size(2) && x.size(2) == cache.size(3),
                    name, " must have shape (tokens, ", cache.size(2), ", ", cache.size(3), ")");
    STD_TORCH_CHECK(x.scalar_type() == k_cache.scalar_type() && cache.scalar_type() == k_cache.scalar_type(), name,
                    " and its cache must have the dtype of k_cache");
    STD_TORCH_CHECK(x.size(2) == 1 || x.stride(2) == 1, name, " must be contiguous in its last dim");
    check_device(x, name, k_cache);
  };
  STD_TORCH_CHECK(k.dim() == 3, "k must have 3 dims (tokens, heads, features), got ", k.dim());
  check_rows_like_cache(k, "k", k_cache);
  check_rows_like_cache(v, "v", v_cache);
  STD_TORCH_CHECK(page_table.dim() == 2 && page_table.scalar_type() == ScalarType::Int,
                  "page_table must have 2 dims (sequences, pages) and be int32");
  STD_TORCH_CHECK(page_table.size(1) <= 1 || page_table.stride(1) == 1,
                  "page_table must be contiguous in its last dim");
  check_device(page_table, "page_table", k_cache);
  check_index(sequences, "sequences", k.size(0), k_cache);
  check_index(positions, "positions", k.size(0), k_cache);
}

inline const int* ints(const Tensor& t) { return static_cast<const int*>(t.const_data_ptr()); }

}  // namespace cs336
