// torch.ops.cs336.{rms,layer}_norm_{fwd,residual_fwd,bwd} on CUDA: check, allocate, guard, launch.
#include "kernels/norm.h"

#include <optional>
#include <tuple>

#include "ops/norm.h"

namespace cs336 {
namespace {

Tensor new_rows(const Tensor& x) { return new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type()); }

Tensor new_row_stat(const Tensor& x) { return new_tensor(x, {x.size(0)}, ScalarType::Float); }

Tensor new_features(const Tensor& w) { return new_tensor(w, {w.size(0)}, w.scalar_type()); }

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

cudaStream_t stream_of(const Tensor& t) { return static_cast<cudaStream_t>(current_stream(t)); }

struct Outputs {
  Tensor y, rstd;
  std::optional<Tensor> mean, sum;
};

Outputs forward(const Tensor& x, const Tensor* residual, const Tensor& w, const Tensor* b, double eps, bool centred) {
  check_norm_fwd(x, residual, w, b);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Outputs out{.y = new_rows(x), .rstd = new_row_stat(x), .mean = {}, .sum = {}};
  if (centred) out.mean = new_row_stat(x);
  if (residual) out.sum = new_rows(x);
  norm_fwd({.x = x.const_data_ptr(),
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
            .dtype = dtype_of(x, "x"),
            .w_dtype = dtype_of(w, "w")},
           stream_of(x));
  return out;
}

std::tuple<Tensor, Tensor, std::optional<Tensor>> backward(const Tensor& dy, const Tensor* dsum, const Tensor& x,
                                                           const Tensor& w, const Tensor* mean, const Tensor& rstd) {
  check_norm_bwd(dy, dsum, x, w, mean, rstd);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = new_rows(x), dw = new_features(w);
  std::optional<Tensor> db;
  if (mean) db = new_features(w);
  NormBwdParams p{.dy = dy.const_data_ptr(),
                  .dsum = dsum ? dsum->const_data_ptr() : nullptr,
                  .x = x.const_data_ptr(),
                  .w = w.const_data_ptr(),
                  .mean = mean ? static_cast<const float*>(mean->const_data_ptr()) : nullptr,
                  .rstd = static_cast<const float*>(rstd.const_data_ptr()),
                  .dx = dx.mutable_data_ptr(),
                  .dw = dw.mutable_data_ptr(),
                  .db = db ? db->mutable_data_ptr() : nullptr,
                  .partials = nullptr,
                  .M = x.size(0),
                  .N = x.size(1),
                  .dy_stride = dy.stride(0),
                  .dsum_stride = dsum ? dsum->stride(0) : 0,
                  .x_stride = x.stride(0),
                  .centred = mean != nullptr,
                  .dtype = dtype_of(x, "x"),
                  .w_dtype = dtype_of(w, "w")};
  const Tensor partials = new_tensor(x, {norm_bwd_workspace(p)}, ScalarType::Float);
  p.partials = floats(partials);
  norm_bwd(p, stream_of(x));
  return {dx, dw, db};
}

std::tuple<Tensor, Tensor> rms_norm_fwd_cuda(const Tensor& x, const Tensor& w, double eps) {
  const Outputs out = forward(x, nullptr, w, nullptr, eps, false);
  return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_residual_fwd_cuda(const Tensor& x, const Tensor& residual, const Tensor& w,
                                                              double eps) {
  const Outputs out = forward(x, &residual, w, nullptr, eps, false);
  return {out.y, out.rstd, *out.sum};
}

std::tuple<Tensor, Tensor> rms_norm_bwd_cuda(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x,
                                             const Tensor& w, const Tensor& rstd) {
  const auto [dx, dw, _] = backward(dy, pointer(dsum), x, w, nullptr, rstd);
  return {dx, dw};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd_cuda(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b,
                                                       double eps) {
  const Outputs out = forward(x, nullptr, w, pointer(b), eps, true);
  return {out.y, *out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_residual_fwd_cuda(const Tensor& x, const Tensor& residual,
                                                                        const Tensor& w, const std::optional<Tensor>& b,
                                                                        double eps) {
  const Outputs out = forward(x, &residual, w, pointer(b), eps, true);
  return {out.y, *out.mean, out.rstd, *out.sum};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd_cuda(const Tensor& dy, const std::optional<Tensor>& dsum,
                                                       const Tensor& x, const Tensor& w, const Tensor& mean,
                                                       const Tensor& rstd) {
  const auto [dx, dw, db] = backward(dy, pointer(dsum), x, w, &mean, rstd);
  return {dx, dw, *db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd_cuda));
  m.impl("rms_norm_residual_fwd", TORCH_BOX(&rms_norm_residual_fwd_cuda));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd_cuda));
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd_cuda));
  m.impl("layer_norm_residual_fwd", TORCH_BOX(&layer_norm_residual_fwd_cuda));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd_cuda));
}

}  // namespace cs336
