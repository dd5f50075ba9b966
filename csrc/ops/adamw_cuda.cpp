// torch.ops.cs336.adamw_ on CUDA: check, guard, launch.
#include "kernels/adamw.h"

#include "ops/adamw.h"

namespace cs336 {
namespace {

void adamw_cuda(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, const TensorList& steps, const Tensor& lr,
                const std::optional<Tensor>& grad_scale, double beta1, double beta2, double eps, double weight_decay) {
  const auto [tensors, hyper] =
      check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, lr, grad_scale, beta1, beta2, eps, weight_decay);
  if (tensors.empty()) return;
  torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  cuda::adamw(tensors, hyper, current_stream(params[0]));
}

void adamw_remainder_cuda(const TensorList& params, const TensorList& remainders, const TensorList& grads,
                          const TensorList& exp_avgs, const TensorList& exp_avg_sqs, const TensorList& steps,
                          const Tensor& lr, const std::optional<Tensor>& grad_scale, double beta1, double beta2,
                          double eps, double weight_decay) {
  STD_TORCH_CHECK(remainders.size() == params.size(), "params and remainders must have one length");
  auto [tensors, hyper] =
      check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, lr, grad_scale, beta1, beta2, eps, weight_decay);
  for (size_t i = 0, filled = 0; i < params.size(); i++) {
    STD_TORCH_CHECK(params[i].scalar_type() == ScalarType::BFloat16, "params[", i, "] must be bfloat16");
    STD_TORCH_CHECK(remainders[i].scalar_type() == ScalarType::Short, "remainders[", i, "] must be int16");
    check_like(remainders[i], "remainders", params[i], i);
    if (params[i].numel() > 0) tensors[filled++].remainder = static_cast<int16_t*>(remainders[i].mutable_data_ptr());
  }
  if (tensors.empty()) return;
  torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  cuda::adamw(tensors, hyper, current_stream(params[0]));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) {
  m.impl("adamw_", TORCH_BOX(&adamw_cuda));
  m.impl("adamw_remainder_", TORCH_BOX(&adamw_remainder_cuda));
}

}  // namespace cs336
