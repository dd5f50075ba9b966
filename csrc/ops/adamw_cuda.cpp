// torch.ops.cs336.adamw_ on CUDA: check, guard, launch.
#include "kernels/adamw.h"

#include "ops/adamw.h"

namespace cs336 {
namespace {

void adamw_cuda(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, const std::optional<Tensor>& grad_scale, double lr, double beta1,
                double beta2, double eps, double weight_decay, int64_t step) {
  const std::vector<AdamwTensor> tensors =
      check_adamw(params, grads, exp_avgs, exp_avg_sqs, grad_scale, lr, beta1, beta2, eps, weight_decay, step);
  if (tensors.empty()) return;
  torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  adamw(tensors, grad_scale ? static_cast<const float*>(grad_scale->const_data_ptr()) : nullptr,
        adamw_coefficients(lr, beta1, beta2, eps, weight_decay, step),
        static_cast<cudaStream_t>(current_stream(params[0])));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) { m.impl("adamw_", TORCH_BOX(&adamw_cuda)); }

}  // namespace cs336
