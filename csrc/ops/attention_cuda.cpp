// Attention on CUDA: check, allocate, guard, launch. What a user may pass is decided in Python (`supports`); here every
// argument that a kernel would take on trust is checked again.
#include <cuda_runtime.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "common/launch.h"
#include "kernels/attention/attention_plan.h"
#include "ops/tensor.h"

namespace cs336 {
namespace {

constexpr int64_t kMaxTokens = 1 << 29;  // positions and window ends are added in 32 bits

struct Options {
  double scale, softcap;
  bool causal;
  int64_t window_left, window_right;
};

struct Packing {  // of sequences behind each other
  const Tensor &cu_q, &cu_k;
  int64_t max_q, max_k;
};

// ---- checks ----

// (batch, heads, tokens, features), or packed (tokens, heads, features).
struct Layout {
  bool packed;
  int64_t dims() const { return packed ? 3 : 4; }
  int64_t batch(const Tensor& t) const { return packed ? 1 : t.size(0); }
  int64_t heads(const Tensor& t) const { return t.size(1); }
  int64_t tokens(const Tensor& t) const { return t.size(packed ? 0 : 2); }
  int64_t features(const Tensor& t) const { return t.size(packed ? 2 : 3); }
  AttentionTensor strided(const Tensor& t) const {
    return {.data = const_cast<void*>(t.const_data_ptr()),
            .batch_stride = packed ? 0 : t.stride(0),
            .token_stride = t.stride(packed ? 0 : 2),
            .head_stride = t.stride(1)};
  }
};

void check_tensor(const Tensor& t, const char* name, const Layout& layout, const Tensor& q) {
  STD_TORCH_CHECK(t.dim() == layout.dims(), name, " must have ", layout.dims(), " dims ",
                  layout.packed ? "(tokens, heads, features)" : "(batch, heads, tokens, features)", ", got ", t.dim());
  STD_TORCH_CHECK(t.is_cuda(), name, " must be on a CUDA device");
  check_device(t, name, q);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16, name,
                  " must be float16 or bfloat16");
  STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
  STD_TORCH_CHECK(layout.tokens(t) < kMaxTokens, name, " must have fewer than 2^29 tokens, got ", layout.tokens(t));
  STD_TORCH_CHECK(t.numel() == 0 || t.stride(t.dim() - 1) == 1, name, " must be contiguous in its last dim");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name, " must be aligned to 16 bytes");
  for (int64_t d = 0; d + 1 < t.dim(); d++)
    STD_TORCH_CHECK(t.size(d) <= 1 || (t.stride(d) >= 0 && t.stride(d) % 8 == 0 && t.stride(d) < int64_t(1) << 33),
                    name, " must have strides that are multiples of 8 elements, got ", t.stride(d), " in dim ", d);
}

void check_sizes(const Tensor& t, const char* name, const Layout& layout, const Tensor& like, int64_t heads,
                 int64_t features) {
  STD_TORCH_CHECK(layout.batch(t) == layout.batch(like) && layout.tokens(t) == layout.tokens(like) &&
                      layout.heads(t) == heads && layout.features(t) == features,
                  name, " must have ", layout.batch(like), " batch entries, ", heads, " heads, ", layout.tokens(like),
                  " tokens and ", features, " features");
}

void check_starts(const Tensor& cu, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(cu.scalar_type() == ScalarType::Int, name, " must be int32");
  STD_TORCH_CHECK(cu.dim() == 1 && cu.size(0) >= 1, name, " must have shape (sequences + 1,)");
  STD_TORCH_CHECK(cu.size(0) == 1 || cu.stride(0) == 1, name, " must be contiguous");
  check_device(cu, name, q);
}

// float32 of q's tokens: (batch, heads, tokens), packed (heads, tokens).
void check_row_floats(const Tensor& t, const char* name, const Layout& layout, const Tensor& q) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  const bool right = layout.packed
                         ? t.dim() == 2 && t.size(0) == q.size(1) && t.size(1) == q.size(0)
                         : t.dim() == 3 && t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(2) == q.size(2);
  STD_TORCH_CHECK(right, name, " must have shape ", layout.packed ? "(heads, tokens)" : "(batch, heads, tokens)",
                  " of q");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  check_device(t, name, q);
}

// The checked problem of q, k, v.
AttentionProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Layout& layout,
                            const Packing* packing, const Options& options) {
  check_tensor(q, "q", layout, q);
  check_tensor(k, "k", layout, q);
  check_tensor(v, "v", layout, q);
  STD_TORCH_CHECK(layout.batch(k) == layout.batch(q), "k must have the batch size of q");
  STD_TORCH_CHECK(layout.features(k) == layout.features(q), "k must have the head dimension of q");
  STD_TORCH_CHECK(layout.heads(k) >= 1 && layout.heads(q) % layout.heads(k) == 0, "k must have a number of heads that ",
                  "divides q's ", layout.heads(q), ", got ", layout.heads(k));
  check_sizes(v, "v", layout, k, layout.heads(k), layout.features(v));
  STD_TORCH_CHECK(options.scale > 0 && std::isfinite(options.scale), "scale must be positive, got ", options.scale);
  STD_TORCH_CHECK(options.softcap >= 0, "softcap must not be negative, got ", options.softcap);
  STD_TORCH_CHECK(options.window_left >= -1, "window_left must not be below -1, got ", options.window_left);
  STD_TORCH_CHECK(options.window_right >= -1, "window_right must not be below -1, got ", options.window_right);
  const auto window = [](int64_t keys) { return static_cast<int>(std::min(keys, kMaxTokens)); };
  AttentionProblem p{.dtype = dtype_of(q, "q"),
                     .head_dim = static_cast<int>(layout.features(q)),
                     .value_dim = static_cast<int>(layout.features(v)),
                     .q_heads = static_cast<int>(layout.heads(q)),
                     .kv_heads = static_cast<int>(layout.heads(k)),
                     .sequences = static_cast<int>(layout.batch(q)),
                     .q_tokens = static_cast<int>(layout.tokens(q)),
                     .k_tokens = static_cast<int>(layout.tokens(k)),
                     .max_q = static_cast<int>(layout.tokens(q)),
                     .max_k = static_cast<int>(layout.tokens(k)),
                     .cu_q = nullptr,
                     .cu_k = nullptr,
                     .window_left = window(options.window_left),
                     .window_right = options.causal ? 0 : window(options.window_right),
                     .scale = static_cast<float>(options.scale),
                     .softcap = static_cast<float>(options.softcap)};
  if (packing) {
    check_starts(packing->cu_q, "cu_seqlens_q", q);
    check_starts(packing->cu_k, "cu_seqlens_k", q);
    STD_TORCH_CHECK(packing->cu_q.size(0) == packing->cu_k.size(0),
                    "cu_seqlens_k must have as many entries as cu_seqlens_q");
    STD_TORCH_CHECK(packing->max_q >= 0, "max_seqlen_q must not be negative, got ", packing->max_q);
    STD_TORCH_CHECK(packing->max_k >= 0, "max_seqlen_k must not be negative, got ", packing->max_k);
    p.sequences = static_cast<int>(packing->cu_q.size(0) - 1);
    p.max_q = static_cast<int>(std::clamp<int64_t>(p.q_tokens, 1, std::max<int64_t>(1, packing->max_q)));
    p.max_k = static_cast<int>(std::clamp<int64_t>(p.k_tokens, 1, std::max<int64_t>(1, packing->max_k)));
    p.cu_q = static_cast<const int*>(packing->cu_q.const_data_ptr());
    p.cu_k = static_cast<const int*>(packing->cu_k.const_data_ptr());
  }
  return p;
}

void check_machine(const Tensor& q) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, q.get_device_index());
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, q.get_device_index());
  STD_TORCH_CHECK(major == 9 && minor == 0, "q is on a device of compute capability ", major, ".", minor,
                  "; the native attention needs 9.0 (Hopper)");
}

// ---- allocation ----

Tensor new_strided(const Tensor& x, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides) {
  AtenTensorHandle handle = nullptr;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.begin(),
                                                  static_cast<int32_t>(x.scalar_type()), device_type,
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

// With the sizes of `like` but so many features: stored as (batch, tokens, heads, features), so that the projection
// that follows needs no copy.
Tensor new_heads(const Tensor& like, const Layout& layout, int64_t features) {
  const int64_t heads = layout.heads(like), tokens = layout.tokens(like);
  if (layout.packed) return new_strided(like, {tokens, heads, features}, {heads * features, features, 1});
  return new_strided(like, {layout.batch(like), heads, tokens, features},
                     {tokens * heads * features, features, heads * features, 1});
}

cudaStream_t stream_of(const Tensor& t) { return static_cast<cudaStream_t>(current_stream(t)); }

// ---- the ops ----

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Packing* packing,
                                   const Options& options) {
  const Layout layout{packing != nullptr};
  const AttentionProblem p = problem_of(q, k, v, layout, packing, options);
  check_machine(q);
  STD_TORCH_CHECK(find_attention_shape(kAttentionFwdShapes, p.head_dim, p.value_dim), "q must have a head dimension ",
                  "of 64, 96, 128 or 256 with the same in v, or 192 with 128 in v; got ", p.head_dim, " and ",
                  p.value_dim);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor o = new_heads(q, layout, p.value_dim);
  Tensor lse = packing ? new_tensor(q, {p.q_heads, p.q_tokens}, ScalarType::Float)
                       : new_tensor(q, {p.sequences, p.q_heads, p.q_tokens}, ScalarType::Float);
  if (o.numel() == 0) return {o, lse};
  if (p.k_tokens == 0 || p.sequences == 0) {
    torch::stable::zero_(o);
    torch::stable::fill_(lse, -INFINITY);
    return {o, lse};
  }
  const Tensor workspace = new_tensor(q, {attention_fwd_workspace(p)}, ScalarType::Int);
  attention_fwd({.problem = p,
                 .q = layout.strided(q),
                 .k = layout.strided(k),
                 .v = layout.strided(v),
                 .o = layout.strided(o),
                 .lse = static_cast<float*>(lse.mutable_data_ptr()),
                 .workspace = static_cast<int*>(workspace.mutable_data_ptr())},
                stream_of(q));
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                                            const Packing* packing, const Options& options, bool deterministic) {
  const Layout layout{packing != nullptr};
  const AttentionProblem p = problem_of(q, k, v, layout, packing, options);
  check_machine(q);
  const AttentionBwdShape* shape = find_attention_shape(kAttentionBwdShapes, p.head_dim, p.value_dim);
  STD_TORCH_CHECK(shape,
                  "q must have a head dimension of 64, 96, 128 or 256 with the same in v, or 192 with 128 in v; ",
                  "got ", p.head_dim, " and ", p.value_dim);
  STD_TORCH_CHECK(p.softcap == 0 || shape->softcap, "softcap must be 0 with a head dimension of ", p.head_dim);
  check_tensor(dout, "do", layout, q);
  check_sizes(dout, "do", layout, q, p.q_heads, p.value_dim);
  check_tensor(o, "o", layout, q);
  check_sizes(o, "o", layout, q, p.q_heads, p.value_dim);
  check_row_floats(lse, "lse", layout, q);
  if (dlse) check_row_floats(*dlse, "dlse", layout, q);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor dq = new_heads(q, layout, p.head_dim);
  Tensor dk = new_heads(k, layout, p.head_dim);
  Tensor dv = new_heads(k, layout, p.value_dim);
  if (q.numel() == 0 || k.numel() == 0 || p.sequences == 0) {
    for (Tensor* t : {&dq, &dk, &dv})
      if (t->numel()) torch::stable::zero_(*t);
    return {dq, dk, dv};
  }
  const int num_sms = current_device().num_sms;
  const bool in_turns = attention_bwd_in_turns(p, deterministic, num_sms);
  const Tensor workspace =
      new_tensor(q, {ceil_div(AttentionBwdWorkspace(p, in_turns, num_sms).bytes, 4)}, ScalarType::Float);
  attention_bwd({.problem = p,
                 .q = layout.strided(q),
                 .k = layout.strided(k),
                 .v = layout.strided(v),
                 .o = layout.strided(o),
                 .dout = layout.strided(dout),
                 .dq = layout.strided(dq),
                 .dk = layout.strided(dk),
                 .dv = layout.strided(dv),
                 .lse = static_cast<const float*>(lse.const_data_ptr()),
                 .dlse = dlse ? static_cast<const float*>(dlse->const_data_ptr()) : nullptr,
                 .workspace = workspace.mutable_data_ptr(),
                 .deterministic = in_turns},
                stream_of(q));
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_fwd_op(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                            bool causal, int64_t window_left, int64_t window_right, double softcap) {
  return forward(q, k, v, nullptr, {scale, softcap, causal, window_left, window_right});
}

std::tuple<Tensor, Tensor> attention_varlen_fwd_op(const Tensor& q, const Tensor& k, const Tensor& v,
                                                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                   int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                   bool causal, int64_t window_left, int64_t window_right,
                                                   double softcap) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return forward(q, k, v, &packing, {scale, softcap, causal, window_left, window_right});
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd_op(const Tensor& dout, const std::optional<Tensor>& dlse,
                                                    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                                                    const Tensor& lse, double scale, bool causal, int64_t window_left,
                                                    int64_t window_right, double softcap, bool deterministic) {
  return backward(dout, dlse, q, k, v, o, lse, nullptr, {scale, softcap, causal, window_left, window_right},
                  deterministic);
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_bwd_op(const Tensor& dout, const std::optional<Tensor>& dlse,
                                                           const Tensor& q, const Tensor& k, const Tensor& v,
                                                           const Tensor& o, const Tensor& lse,
                                                           const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                           int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                           bool causal, int64_t window_left, int64_t window_right,
                                                           double softcap, bool deterministic) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return backward(dout, dlse, q, k, v, o, lse, &packing, {scale, softcap, causal, window_left, window_right},
                  deterministic);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd_op));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd_op));
  m.impl("attention_varlen_fwd", TORCH_BOX(&attention_varlen_fwd_op));
  m.impl("attention_varlen_bwd", TORCH_BOX(&attention_varlen_bwd_op));
}

}  // namespace cs336
