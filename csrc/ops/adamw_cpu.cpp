// torch.ops.cs336.adamw_ on CPU: check, then one parallel loop over the elements of all parameters.
#include "cpu/adamw.h"

#include <algorithm>

#include "ops/adamw.h"

namespace cs336 {
namespace {

void adamw_cpu(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
               const TensorList& exp_avg_sqs, const TensorList& steps, const Tensor& lr,
               const std::optional<Tensor>& grad_scale, double beta1, double beta2, double eps, double weight_decay) {
  const auto [tensors, hyper] =
      check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, lr, grad_scale, beta1, beta2, eps, weight_decay);
  std::vector<int64_t> ends;  // of each tensor, in elements from the start of the first
  int64_t total = 0;
  for (const AdamwTensor& tensor : tensors) ends.push_back(total += tensor.numel);

  constexpr int64_t kGrain = 16384;
  const auto update = [&, &tensors = tensors, &hyper = hyper](int64_t begin, int64_t end) {
    for (size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); begin < end; i++) {
      const int64_t start = ends[i] - tensors[i].numel, stop = std::min(end, ends[i]);
      cpu::adamw(tensors[i], begin - start, stop - start, hyper);
      begin = stop;
    }
  };
  torch::stable::parallel_for(0, total, kGrain, update);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CPU, m) { m.impl("adamw_", TORCH_BOX(&adamw_cpu)); }

}  // namespace cs336
