// What both adamw_ bindings do before they touch memory.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "common/adamw.h"
#include "ops/tensor.h"

namespace cs336 {

using TensorList = std::vector<Tensor>;

struct AdamwArguments {
  std::vector<AdamwTensor> tensors;  // those that have elements
  AdamwHyper hyper;
};

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
  check_device(t, name, p);
  const auto t_sizes = t.sizes(), p_sizes = p.sizes(), t_strides = t.strides(), p_strides = p.strides();
  const bool same_shape = std::equal(t_sizes.begin(), t_sizes.end(), p_sizes.begin(), p_sizes.end());
  STD_TORCH_CHECK(same_shape, name, "[", i, "] must have the shape of params[", i, "]");
  bool same_order = true;  // a dim of size 1 may have any stride
  for (size_t d = 0; d < p_sizes.size(); d++) same_order &= p_sizes[d] <= 1 || t_strides[d] == p_strides[d];
  STD_TORCH_CHECK(same_order || p.numel() == 0, name, "[", i, "] must have the strides of params[", i, "]");
}

// One float32 element beside p.
inline const float* check_number(const Tensor& t, const char* name, const Tensor& p) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Float, name, " must be one float32 element");
  check_device(t, name, p);
  return static_cast<const float*>(t.const_data_ptr());
}

inline float* moment(const Tensor& t, const char* name, const Tensor& p, size_t i) {
  check_like(t, name, p, i);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, "[", i, "] must be float32");
  return static_cast<float*>(t.mutable_data_ptr());
}

inline AdamwArguments check_adamw(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                                  const TensorList& exp_avg_sqs, const TensorList& steps, const Tensor& lr,
                                  const std::optional<Tensor>& grad_scale, double beta1, double beta2, double eps,
                                  double weight_decay) {
  const size_t count = params.size();
  STD_TORCH_CHECK(
      grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count && steps.size() == count,
      "params, grads, exp_avgs, exp_avg_sqs and steps must have one length");
  STD_TORCH_CHECK(eps >= 0 && weight_decay >= 0, "eps and weight_decay must not be negative");
  STD_TORCH_CHECK(0 <= beta1 && beta1 < 1 && 0 <= beta2 && beta2 < 1, "betas must be in [0, 1)");
  AdamwArguments arguments{};
  if (count == 0) return arguments;
  const Tensor& first = params[0];
  arguments.hyper =
      adamw_hyper(check_number(lr, "lr", first), grad_scale ? check_number(*grad_scale, "grad_scale", first) : nullptr,
                  beta1, beta2, eps, weight_decay);
  arguments.tensors.reserve(count);
  for (size_t i = 0; i < count; i++) {
    const Tensor &p = params[i], &g = grads[i];
    check_device(p, "params", first);
    STD_TORCH_CHECK(is_dense(p), "params[", i, "] must be non-overlapping and dense");
    check_like(g, "grads", p, i);
    const AdamwTensor tensor = {.p = p.mutable_data_ptr(),
                                .g = g.const_data_ptr(),
                                .m = moment(exp_avgs[i], "exp_avgs", p, i),
                                .v = moment(exp_avg_sqs[i], "exp_avg_sqs", p, i),
                                .step = check_number(steps[i], "steps", p),
                                .numel = p.numel(),
                                .p_dtype = float_dtype_of(p, "params"),
                                .g_dtype = float_dtype_of(g, "grads")};
    if (tensor.numel > 0) arguments.tensors.push_back(tensor);
  }
  return arguments;
}

}  // namespace cs336
