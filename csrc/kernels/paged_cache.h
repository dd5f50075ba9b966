// Writing to a paged cache on CUDA: new tokens, and whole pages. Elements are bytes here: any dtype.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace cs336 {

// (pages or 1, tokens, heads, bytes of a head's features) with contiguous features; strides in bytes.
struct PagedBytes {
  char* data;
  int64_t page_stride, token_stride, head_stride;
  int bytes;
};

struct AppendKvParams {
  PagedBytes caches[2], rows[2];  // keys, values; rows have no pages
  const int *page_table, *sequences, *positions;
  int64_t table_stride;
  int64_t tokens;
  int heads, num_pages, page_size, table_rows, table_width;
};

struct CopyPagesParams {
  PagedBytes cache;
  const int *sources, *targets;
  int64_t pairs;
  int heads, num_pages, page_size;
};

void append_kv(const AppendKvParams& p, cudaStream_t stream);
void copy_pages(const CopyPagesParams& p, cudaStream_t stream);

}  // namespace cs336
