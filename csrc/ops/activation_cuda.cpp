// Activations on CUDA: check, allocate, guard, launch.
#include "kernels/activation.h"

#include <optional>
#include <tuple>

#include "ops/tensor.h"

namespace cs336 {
namespace {

void check_like(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(1), name, " must have the shape of x");
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, " must be contiguous in its last dim");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  check_device(t, name, x);
}

cuda::ActivationParams checked(const Tensor& x, const std::optional<Tensor>& up, const Tensor* dy, int64_t kind) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dims, got ", x.dim());
  STD_TORCH_CHECK(x.size(0) < int64_t{1} << 31 && x.size(1) < int64_t{1} << 30, "x must be smaller");
  check_like(x, "x", x);
  if (up) check_like(*up, "up", x);
  if (dy) check_like(*dy, "dy", x);
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int>(cuda::Activation::kRelu2), "kind must be 0 to 3, got ", kind);
  return {.x = x.const_data_ptr(),
          .up = up ? up->const_data_ptr() : nullptr,
          .dy = dy ? dy->const_data_ptr() : nullptr,
          .y = nullptr,
          .dup = nullptr,
          .M = x.size(0),
          .N = x.size(1),
          .x_stride = x.stride(0),
          .up_stride = up ? up->stride(0) : 0,
          .dy_stride = dy ? dy->stride(0) : 0,
          .out_stride = x.size(1),
          .dtype = float_dtype_of(x, "x"),
          .activation = static_cast<cuda::Activation>(kind)};
}

Tensor new_like(const Tensor& x) { return new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type()); }

Tensor activation_fwd(const Tensor& x, const std::optional<Tensor>& up, int64_t kind) {
  cuda::ActivationParams p = checked(x, up, nullptr, kind);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = new_like(x);
  p.y = y.mutable_data_ptr();
  cuda::activation_fwd(p, current_stream(x));
  return y;
}

std::tuple<Tensor, Tensor> activation_bwd(const Tensor& x, const std::optional<Tensor>& up, const Tensor& dy,
                                          int64_t kind) {
  cuda::ActivationParams p = checked(x, up, &dy, kind);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = new_like(x), dup = up ? new_like(x) : new_tensor(x, {0}, x.scalar_type());
  p.y = dx.mutable_data_ptr();
  p.dup = up ? dup.mutable_data_ptr() : nullptr;
  cuda::activation_bwd(p, current_stream(x));
  return {dx, dup};
}

// both: x and up side by side, (M, 2N), and so are their gradients.
Tensor gated_bwd(const Tensor& both, const Tensor& dy, int64_t kind) {
  check_like(both, "both", both);
  STD_TORCH_CHECK(dy.dim() == 2 && both.size(1) == 2 * dy.size(1), "both must have twice the columns of dy");
  STD_TORCH_CHECK(both.scalar_type() == dy.scalar_type() && both.size(0) == dy.size(0), "both must be like dy");
  cuda::ActivationParams p = checked(dy, std::nullopt, &dy, kind);
  check_device(both, "both", dy);
  const int64_t half = dy.size(1) * static_cast<int64_t>(dy.element_size());
  torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  Tensor out = new_like(both);
  p.x = both.const_data_ptr();
  p.up = static_cast<const char*>(p.x) + half;
  p.y = out.mutable_data_ptr();
  p.dup = static_cast<char*>(p.y) + half;
  p.x_stride = p.up_stride = both.stride(0);
  p.out_stride = out.size(1);
  cuda::activation_bwd(p, current_stream(dy));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) {
  m.impl("activation_fwd", TORCH_BOX(&activation_fwd));
  m.impl("activation_bwd", TORCH_BOX(&activation_bwd));
  m.impl("gated_bwd", TORCH_BOX(&gated_bwd));
}

}  // namespace cs336
