// Attention over a paged cache on the CPU, for decoding and prefill. Every call does a range of the work, so that a
// caller's threads can share it; the results do not depend on how the ranges are cut, nor a row's on other rows.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace cs336::cpu {

struct PagedCache {  // (pages, tokens of a page, heads, features) with contiguous features; strides in elements
  const void* data;
  int64_t page_stride, token_stride, head_stride, features;
};

struct PagedAttentionParams {
  const void* q;  // token t of sequence b at b * q_batch_stride + t * q_token_stride
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  PagedCache k, v;
  const int* page_table;  // (sequences, ...)
  int64_t table_stride;
  const int* seq_lens;      // (sequences,)
  const int* cu_seqlens_q;  // (sequences + 1,), or null: `queries` each
  const float* sinks;       // (heads,) or null
  void* o;                  // (tokens, heads, features of v) contiguous
  float* lse;               // (sequences, heads, queries), or (heads, tokens) with cu_seqlens_q
  int64_t sequences, queries, tokens, heads, kv_heads, page_size;
  int64_t window;  // keys before its own that a query sees; -1: all
  float scale, softcap;
  Dtype dtype;  // of q, the caches and o
};

// A unit of work: so many query tokens of a sequence, with all query heads of one key head.
inline constexpr int64_t kPagedQueries = 16;

struct PagedUnit {
  int64_t b, head, first, last;  // sequence, key head, query tokens
};

void paged_attention(const PagedAttentionParams& p, const PagedUnit* units, int64_t count);

}  // namespace cs336::cpu
