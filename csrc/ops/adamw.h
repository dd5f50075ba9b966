// What both adamw_ bindings do before they touch memory.
#pragma once
#include <optional>
#include <vector>

#include "common/adamw.h"
#include "ops/tensor.h"

namespace cs336 {

using TensorList = std::vector<Tensor>;

// Elements fill one span of memory, in any order of dims.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t filled = 1, size = 1;
  for (; filled < t.numel() && size > 0; filled *= size) {
    size = 0;
    for (size_t d = 0; d < sizes.size(); d++)
      if (sizes[d] > 1 && strides[d] == filled) size = sizes[d];
  }
  return filled == t.numel();
}

inline void check_like(const Tensor& t, const char* name, const Tensor& p, size_t i) {
  STD_TORCH_CHECK(t.device() == p.device(), name, "[", i, "] must be on the device of params[", i, "]");
  const auto t_sizes = t.sizes(), p_sizes = p.sizes(), t_strides = t.strides(), p_strides = p.strides();
  STD_TORCH_CHECK(t_sizes == p_sizes, name, "[", i, "] must have the shape of params[", i, "]");
  bool same_order = true;  // a dim of size 1 may have any stride
  for (size_t d = 0; d < p_sizes.size(); d++) same_order &= p_sizes[d] <= 1 || t_strides[d] == p_strides[d];
  STD_TORCH_CHECK(same_order || p.numel() == 0, name, "[", i, "] must have the strides of params[", i, "]");
}

inline std::vector<AdamwTensor> check_adamw(const TensorList& params, const TensorList& grads,
                                            const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                                            const std::optional<Tensor>& grad_scale, double lr, double beta1,
                                            double beta2, double eps, double weight_decay, int64_t step) {
  STD_TORCH_CHECK(
      grads.size() == params.size() && exp_avgs.size() == params.size() && exp_avg_sqs.size() == params.size(),
      "params, grads, exp_avgs and exp_avg_sqs must have one length");
  STD_TORCH_CHECK(lr >= 0 && eps >= 0 && weight_decay >= 0, "lr, eps and weight_decay must not be negative");
  STD_TORCH_CHECK(0 <= beta1 && beta1 < 1 && 0 <= beta2 && beta2 < 1, "betas must be in [0, 1)");
  STD_TORCH_CHECK(step >= 1, "step counts from 1, got ", step);
  if (grad_scale) {
    STD_TORCH_CHECK(grad_scale->numel() == 1 && grad_scale->scalar_type() == ScalarType::Float,
                    "grad_scale must be one float32 element");
    STD_TORCH_CHECK(params.empty() || grad_scale->device() == params[0].device(),
                    "grad_scale must be on the device of params");
  }
  std::vector<AdamwTensor> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); i++) {
    const Tensor &p = params[i], &g = grads[i], &m = exp_avgs[i], &v = exp_avg_sqs[i];
    STD_TORCH_CHECK(p.device() == params[0].device(), "params must be on one device");
    STD_TORCH_CHECK(is_dense(p), "params[", i, "] must be non-overlapping and dense");
    check_like(g, "grads", p, i);
    check_like(m, "exp_avgs", p, i);
    check_like(v, "exp_avg_sqs", p, i);
    STD_TORCH_CHECK(m.scalar_type() == ScalarType::Float && v.scalar_type() == ScalarType::Float,
                    "exp_avgs and exp_avg_sqs must be float32");
    const AdamwTensor tensor = {.p = p.mutable_data_ptr(),
                                .g = g.const_data_ptr(),
                                .m = static_cast<float*>(m.mutable_data_ptr()),
                                .v = static_cast<float*>(v.mutable_data_ptr()),
                                .numel = p.numel(),
                                .p_dtype = dtype_of(p, "params"),
                                .g_dtype = dtype_of(g, "grads")};
    if (tensor.numel > 0) tensors.push_back(tensor);
  }
  return tensors;
}

}  // namespace cs336
