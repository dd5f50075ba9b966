// Attention of the last tokens of each sequence to a paged cache of keys and values, on CUDA.
#pragma once
#include <cstdint>

#include "common/dtype.h"

using cudaStream_t = struct CUstream_st*;  // as cuda_runtime.h has it: launch plans are tested where there is none

namespace cs336 {

// (pages, tokens of a page, heads, features) with contiguous features; strides in elements.
struct PagedCache {
  const void* data;
  int64_t page_stride, token_stride, head_stride;
};

struct PagedAttentionParams {
  const void* q;  // (sequences, queries, kv_heads * group, head_dim), features contiguous
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  PagedCache k, v;
  const int* page_table;  // (sequences, table_width)
  int64_t table_stride;
  const int* seq_lens;  // (sequences,)
  const float* sinks;   // (kv_heads * group,) or null
  void* o;              // contiguous, as q
  float* lse;           // (sequences, kv_heads * group, queries)
  void* workspace;      // paged_attention_workspace(p) bytes, 16-byte aligned, holding anything
  uint64_t tag;         // what no memory holds by chance; the launcher makes one up
  int sequences, queries, kv_heads, group;
  int num_pages, page_size, table_width;
  int head_dim;
  Dtype dtype;     // F16 or BF16
  int window;      // keys before its own that a query sees; -1: all
  bool invariant;  // sums in an order that the sequence's length alone says, not its batch
  int spare;       // multiprocessors that are left to kernels of other streams
  bool settled;    // neither the kernel ahead nor those that it overlaps write more than the last `queries` tokens
  float scale, softcap;
};

int64_t paged_attention_workspace(const PagedAttentionParams& p);
void paged_attention(PagedAttentionParams p, cudaStream_t stream);

}  // namespace cs336
