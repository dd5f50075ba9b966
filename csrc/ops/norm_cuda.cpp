// The norms on CUDA: allocate, guard, launch.
#include "kernels/norm.h"

#include "ops/norm.h"

namespace cs336 {
NormOutputs norm_forward(const Tensor& x, const Tensor* residual, const Tensor& w, const Tensor* b, double eps,
                         bool centred) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  NormOutputs out = new_norm_outputs(x, residual, centred);
  cuda::norm_fwd({.x = x.const_data_ptr(),
                  .residual = residual ? residual->const_data_ptr() : nullptr,
                  .w = w.const_data_ptr(),
                  .b = b ? b->const_data_ptr() : nullptr,
                  .y = out.y.mutable_data_ptr(),
                  .sum = residual ? out.sum->mutable_data_ptr() : nullptr,
                  .mean = centred ? floats(*out.mean) : nullptr,
                  .rstd = floats(out.rstd),
                  .M = x.size(0),
                  .N = x.size(1),
                  .x_stride = x.stride(0),
                  .residual_stride = residual ? residual->stride(0) : 0,
                  .eps = static_cast<float>(eps),
                  .centred = centred,
                  .dtype = float_dtype_of(x, "x"),
                  .w_dtype = float_dtype_of(w, "w")},
                 current_stream(x));
  return out;
}

NormGradients norm_backward(const Tensor& dy, const Tensor* dsum, const Tensor& x, const Tensor& w, const Tensor* mean,
                            const Tensor& rstd) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  NormGradients out = new_norm_gradients(x, w, mean);
  cuda::NormBwdParams p{.dy = dy.const_data_ptr(),
                        .dsum = dsum ? dsum->const_data_ptr() : nullptr,
                        .x = x.const_data_ptr(),
                        .w = w.const_data_ptr(),
                        .mean = mean ? static_cast<const float*>(mean->const_data_ptr()) : nullptr,
                        .rstd = static_cast<const float*>(rstd.const_data_ptr()),
                        .dx = out.dx.mutable_data_ptr(),
                        .dw = out.dw.mutable_data_ptr(),
                        .db = out.db ? out.db->mutable_data_ptr() : nullptr,
                        .partials = nullptr,
                        .M = x.size(0),
                        .N = x.size(1),
                        .dy_stride = dy.stride(0),
                        .dsum_stride = dsum ? dsum->stride(0) : 0,
                        .x_stride = x.stride(0),
                        .centred = mean != nullptr,
                        .dtype = float_dtype_of(x, "x"),
                        .w_dtype = float_dtype_of(w, "w")};
  const Tensor partials = new_tensor(x, {cuda::norm_bwd_workspace(p)}, ScalarType::Float);
  p.partials = floats(partials);
  cuda::norm_bwd(p, current_stream(x));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) { register_norms(m); }

}  // namespace cs336
