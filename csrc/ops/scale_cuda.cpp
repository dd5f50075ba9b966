// torch.ops.cs336.scale_ on CUDA: check, guard, launch.
#include "kernels/scale.h"

#include <optional>

#include "ops/tensor.h"

namespace cs336 {
namespace {

void scale_(const Tensor& out, const std::optional<Tensor>& x, const Tensor& scale) {
  const Dtype out_dtype = float_dtype_of(out, "out");
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  if (x) {
    const auto sizes = out.sizes(), others = x->sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), others.begin(), others.end()), "x must have out's shape");
    STD_TORCH_CHECK(x->is_contiguous(), "x must be contiguous");
    check_device(*x, "x", out);
  }
  STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, "scale must be one float32 element");
  check_device(scale, "scale", out);
  torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  cuda::scale({.x = x ? x->const_data_ptr() : nullptr,
               .out = out.mutable_data_ptr(),
               .scale = static_cast<const float*>(scale.const_data_ptr()),
               .numel = out.numel(),
               .x_dtype = x ? float_dtype_of(*x, "x") : out_dtype,
               .out_dtype = out_dtype},
              current_stream(out));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) { m.impl("scale_", TORCH_BOX(&scale_)); }

}  // namespace cs336
