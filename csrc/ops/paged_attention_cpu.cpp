// torch.ops.cs336.paged_attention and paged_prefill on CPU: check, allocate, share the work among torch's threads.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/paged_attention.h"
#include "ops/paged_cache.h"

namespace cs336 {
namespace {

using Outputs = std::tuple<Tensor, Tensor>;

cpu::PagedCache cache_of(const Tensor& t) {
  return {.data = t.const_data_ptr(),
          .page_stride = t.stride(0),
          .token_stride = t.stride(1),
          .head_stride = t.stride(2),
          .features = t.size(3)};
}

// Lengths that the table can hold, and up to them pages that there are.
void check_pages(const Tensor& k_cache, const Tensor& page_table, const Tensor& seq_lens) {
  const int64_t page = k_cache.size(1);
  for (int64_t b = 0; b < seq_lens.size(0); b++) {
    const int length = ints(seq_lens)[b];
    STD_TORCH_CHECK(length >= 0 && length <= page_table.size(1) * page, "seq_lens must be from 0 to ",
                    page_table.size(1), " pages of ", page, " tokens, got ", length);
    const int* row = ints(page_table) + b * page_table.stride(0);
    for (int64_t j = 0; j * page < length; j++)
      STD_TORCH_CHECK(row[j] >= 0 && row[j] < k_cache.size(0), "page_table must hold pages from 0 to ",
                      k_cache.size(0) - 1, " up to each sequence's length, got ", row[j]);
  }
}

// q (B, Q, H, D), or (T, H, D) with cu_seqlens_q.
Outputs attend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
               const Tensor& seq_lens, const Tensor* cu_seqlens_q, double scale, int64_t window, double softcap,
               const std::optional<Tensor>& sinks) {
  const int64_t dims = cu_seqlens_q ? 3 : 4;
  STD_TORCH_CHECK(q.dim() == dims, "q must have ", dims, " dims, got ", q.dim());
  const Dtype dtype = float_dtype_of(q, "q");
  check_cache(k_cache, "k_cache");
  check_cache(v_cache, "v_cache");
  for (int64_t d = 0; d < 3; d++)
    STD_TORCH_CHECK(v_cache.size(d) == k_cache.size(d), "v_cache must have the pages, tokens and heads of k_cache");
  STD_TORCH_CHECK(k_cache.scalar_type() == q.scalar_type() && v_cache.scalar_type() == q.scalar_type(),
                  "k_cache and v_cache must have the dtype of q");
  STD_TORCH_CHECK(q.size(dims - 1) == k_cache.size(3), "q must have the ", k_cache.size(3), " features of k_cache");
  STD_TORCH_CHECK(q.size(dims - 1) == 1 || q.stride(dims - 1) == 1, "q must be contiguous in its last dim");
  const int64_t H = q.size(dims - 2), kv_heads = k_cache.size(2), E = v_cache.size(3);
  STD_TORCH_CHECK(H % kv_heads == 0, "q must have a multiple of k_cache's ", kv_heads, " heads, got ", H);
  STD_TORCH_CHECK(window >= -1, "window must not be below -1, got ", window);
  STD_TORCH_CHECK(softcap >= 0, "softcap must not be negative, got ", softcap);
  if (cu_seqlens_q) {
    STD_TORCH_CHECK(cu_seqlens_q->dim() == 1 && cu_seqlens_q->size(0) >= 1, "cu_seqlens_q must have shape (B + 1,)");
    check_index(*cu_seqlens_q, "cu_seqlens_q", cu_seqlens_q->size(0), q);
  }
  const int64_t B = cu_seqlens_q ? cu_seqlens_q->size(0) - 1 : q.size(0), Q = cu_seqlens_q ? 0 : q.size(1);
  const int64_t T = cu_seqlens_q ? q.size(0) : B * Q;
  STD_TORCH_CHECK(page_table.dim() == 2 && page_table.size(0) == B && page_table.scalar_type() == ScalarType::Int,
                  "page_table must be int32 with a row for each of ", B, " sequences");
  STD_TORCH_CHECK(page_table.size(1) <= 1 || page_table.stride(1) == 1,
                  "page_table must be contiguous in its last dim");
  check_index(seq_lens, "seq_lens", B, q);
  for (const Tensor* t : {&k_cache, &v_cache, &page_table}) check_device(*t, "every tensor", q);
  if (sinks) {
    STD_TORCH_CHECK(
        sinks->dim() == 1 && sinks->size(0) == H && sinks->scalar_type() == ScalarType::Float && sinks->is_contiguous(),
        "sinks must have shape (", H, ",), float32 and contiguous");
    check_device(*sinks, "sinks", q);
  }
  check_pages(k_cache, page_table, seq_lens);

  std::vector<cpu::PagedUnit> units;
  int64_t start = 0;
  for (int64_t b = 0; b < B; b++) {
    const int64_t queries = cu_seqlens_q ? ints(*cu_seqlens_q)[b + 1] - start : Q;
    STD_TORCH_CHECK(queries >= 0 && (!cu_seqlens_q || start + queries <= T) &&
                        (b > 0 || !cu_seqlens_q || *ints(*cu_seqlens_q) == 0),
                    "cu_seqlens_q must rise from 0 to q's ", T, " rows");
    start += queries;
    for (int64_t head = 0; head < kv_heads; head++)
      for (int64_t first = 0; first < queries; first += cpu::kPagedQueries)
        units.push_back({b, head, first, std::min(queries, first + cpu::kPagedQueries)});
  }
  STD_TORCH_CHECK(!cu_seqlens_q || start == T, "cu_seqlens_q must rise from 0 to q's ", T, " rows");
  Tensor o = cu_seqlens_q ? new_tensor(q, {T, H, E}, q.scalar_type()) : new_tensor(q, {B, Q, H, E}, q.scalar_type());
  Tensor lse = cu_seqlens_q ? new_tensor(q, {H, T}, ScalarType::Float) : new_tensor(q, {B, H, Q}, ScalarType::Float);
  const cpu::PagedAttentionParams p{.q = q.const_data_ptr(),
                                    .q_batch_stride = cu_seqlens_q ? 0 : q.stride(0),
                                    .q_token_stride = q.stride(dims - 3),
                                    .q_head_stride = q.stride(dims - 2),
                                    .k = cache_of(k_cache),
                                    .v = cache_of(v_cache),
                                    .page_table = ints(page_table),
                                    .table_stride = page_table.stride(0),
                                    .seq_lens = ints(seq_lens),
                                    .cu_seqlens_q = cu_seqlens_q ? ints(*cu_seqlens_q) : nullptr,
                                    .sinks = sinks ? static_cast<const float*>(sinks->const_data_ptr()) : nullptr,
                                    .o = o.mutable_data_ptr(),
                                    .lse = static_cast<float*>(lse.mutable_data_ptr()),
                                    .sequences = B,
                                    .queries = Q,
                                    .tokens = T,
                                    .heads = H,
                                    .kv_heads = kv_heads,
                                    .page_size = k_cache.size(1),
                                    .window = window,
                                    .scale = static_cast<float>(scale),
                                    .softcap = static_cast<float>(softcap),
                                    .dtype = dtype};
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t first, int64_t last) {
    cpu::paged_attention(p, units.data() + first, last - first);
  });
  return {o, lse};
}

// Any order of sums here is that of one sequence alone, and nothing starts early.
Outputs paged_attention_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
                           const Tensor& seq_lens, double scale, int64_t window, double softcap,
                           const std::optional<Tensor>& sinks, bool /*invariant*/, bool /*settled*/,
                           int64_t /*spare*/) {
  return attend(q, k_cache, v_cache, page_table, seq_lens, nullptr, scale, window, softcap, sinks);
}

Outputs paged_prefill_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
                         const Tensor& seq_lens, const Tensor& cu_seqlens_q, int64_t, double scale, int64_t window,
                         double softcap, const std::optional<Tensor>& sinks) {
  return attend(q, k_cache, v_cache, page_table, seq_lens, &cu_seqlens_q, scale, window, softcap, sinks);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_op));
  m.impl("paged_prefill", TORCH_BOX(&paged_prefill_op));
}

}  // namespace cs336
