// torch.ops.cs336.paged_attention on CUDA: check, allocate, guard, launch.
#include "kernels/paged_attention/paged_attention.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "ops/tensor.h"

namespace cs336 {
namespace {

constexpr int64_t kMost = int64_t{1} << 30;  // keys are counted in 32 bits

// (..., heads, features) on q's device, 16 bits wide; rows that start at multiples of 16 bytes.
void check_rows_of(const Tensor& t, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dims, got ", t.dim());
  STD_TORCH_CHECK(t.is_cuda(), name, " must be on a CUDA device");
  check_device(t, name, q);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16, name,
                  " must be float16 or bfloat16");
  STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
  STD_TORCH_CHECK(t.size(3) == 64 || t.size(3) == 128, name, " must have heads of 64 or 128 features, got ", t.size(3));
  STD_TORCH_CHECK(t.numel() == 0 || t.stride(3) == 1, name, " must be contiguous in its last dim");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name, " must be aligned to 16 bytes");
  for (int64_t d = 0; d < 3; d++)
    STD_TORCH_CHECK(t.size(d) <= 1 || (t.stride(d) >= 0 && t.stride(d) % 8 == 0), name,
                    " must have strides that are multiples of 8 elements, got ", t.stride(d), " in dim ", d);
}

void check_ints(const Tensor& t, const char* name, int64_t dims, const Tensor& q) {
  STD_TORCH_CHECK(t.dim() == dims, name, " must have ", dims, " dims, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, name, " must be int32");
  STD_TORCH_CHECK(t.size(0) == q.size(0), name, " must have a row for each of ", q.size(0), " sequences, got ",
                  t.size(0));
  STD_TORCH_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1, name, " must be contiguous in its last dim");
  check_device(t, name, q);
}

PagedCache cache_of(const Tensor& t) {
  return {
      .data = t.const_data_ptr(), .page_stride = t.stride(0), .token_stride = t.stride(1), .head_stride = t.stride(2)};
}

std::tuple<Tensor, Tensor> paged_attention_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                              const Tensor& page_table, const Tensor& seq_lens, double scale,
                                              int64_t window, double softcap, const std::optional<Tensor>& sinks,
                                              bool invariant, bool settled, int64_t spare) {
  check_rows_of(q, "q", q);
  check_rows_of(k_cache, "k_cache", q);
  check_rows_of(v_cache, "v_cache", q);
  for (int64_t d = 0; d < 4; d++)
    STD_TORCH_CHECK(v_cache.size(d) == k_cache.size(d), "v_cache must have the shape of k_cache");
  STD_TORCH_CHECK(q.size(3) == k_cache.size(3), "q must have the ", k_cache.size(3), " features of k_cache");
  const int64_t page = k_cache.size(1), kv_heads = k_cache.size(2), heads = q.size(2), B = q.size(0), Q = q.size(1);
  STD_TORCH_CHECK(page >= 16 && page % 16 == 0, "k_cache must have pages of a multiple of 16 tokens, got ", page);
  STD_TORCH_CHECK(kv_heads >= 1 && heads % kv_heads == 0, "q must have a multiple of k_cache's ", kv_heads,
                  " heads, got ", heads);
  check_ints(page_table, "page_table", 2, q);
  check_ints(seq_lens, "seq_lens", 1, q);
  STD_TORCH_CHECK(window >= -1, "window must not be below -1, got ", window);
  STD_TORCH_CHECK(spare >= 0 && spare < kMost, "spare must be a number of multiprocessors, got ", spare);
  STD_TORCH_CHECK(softcap >= 0, "softcap must not be negative, got ", softcap);
  if (sinks) {
    STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == heads && sinks->scalar_type() == ScalarType::Float &&
                        sinks->is_contiguous(),
                    "sinks must have shape (", heads, ",), float32 and contiguous");
    check_device(*sinks, "sinks", q);
  }
  const int64_t keys = page_table.size(1) * page;
  STD_TORCH_CHECK(
      keys < kMost && k_cache.size(0) < kMost && B * std::max<int64_t>(1, heads * Q) * (keys / 16 + 1) < kMost,
      "page_table must hold fewer keys: ", B, " sequences of ", keys, " are too many");

  Tensor o = new_tensor(q, {B, Q, heads, q.size(3)}, q.scalar_type());
  Tensor lse = new_tensor(q, {B, heads, Q}, ScalarType::Float);
  if (o.numel() == 0) return {o, lse};
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  PagedAttentionParams p{.q = q.const_data_ptr(),
                         .q_batch_stride = q.stride(0),
                         .q_token_stride = q.stride(1),
                         .q_head_stride = q.stride(2),
                         .k = cache_of(k_cache),
                         .v = cache_of(v_cache),
                         .page_table = static_cast<const int*>(page_table.const_data_ptr()),
                         .table_stride = page_table.stride(0),
                         .seq_lens = static_cast<const int*>(seq_lens.const_data_ptr()),
                         .sinks = sinks ? static_cast<const float*>(sinks->const_data_ptr()) : nullptr,
                         .o = o.mutable_data_ptr(),
                         .lse = static_cast<float*>(lse.mutable_data_ptr()),
                         .workspace = nullptr,
                         .tag = 0,
                         .sequences = static_cast<int>(B),
                         .queries = static_cast<int>(Q),
                         .kv_heads = static_cast<int>(kv_heads),
                         .group = static_cast<int>(heads / kv_heads),
                         .num_pages = static_cast<int>(k_cache.size(0)),
                         .page_size = static_cast<int>(page),
                         .table_width = static_cast<int>(page_table.size(1)),
                         .head_dim = static_cast<int>(q.size(3)),
                         .dtype = dtype_of(q, "q"),
                         .window = static_cast<int>(std::min(window, kMost)),
                         .invariant = invariant,
                         .spare = static_cast<int>(spare),
                         .settled = settled,
                         .scale = static_cast<float>(scale),
                         .softcap = static_cast<float>(softcap)};
  const Tensor workspace = new_tensor(q, {paged_attention_workspace(p)}, ScalarType::Byte);
  p.workspace = data_of(workspace);
  paged_attention(p, current_stream(q));
  return {o, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) { m.impl("paged_attention", TORCH_BOX(&paged_attention_op)); }

}  // namespace cs336
