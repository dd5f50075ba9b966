// Dropout on CUDA: check, allocate, guard, launch.
#include "kernels/dropout.h"

#include <cmath>
#include <optional>

#include "ops/tensor.h"

namespace cs336 {
namespace {

Tensor dropout_fwd(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& seed, double p) {
  const Dtype dtype = float_dtype_of(x, "x");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  if (residual) {
    const auto sizes = x.sizes(), others = residual->sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), others.begin(), others.end()),
                    "residual must have the shape of x");
    STD_TORCH_CHECK(residual->is_contiguous(), "residual must be contiguous");
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type(), "residual must have the dtype of x");
    check_device(*residual, "residual", x);
  }
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed must be one int64 element");
  check_device(seed, "seed", x);
  STD_TORCH_CHECK(p >= 0 && p < 1, "p must be in [0, 1), got ", p);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  cuda::dropout_fwd({.x = x.const_data_ptr(),
                     .residual = residual ? residual->const_data_ptr() : nullptr,
                     .y = y.mutable_data_ptr(),
                     .seed = static_cast<const int64_t*>(seed.const_data_ptr()),
                     .numel = x.numel(),
                     .below = static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0)),
                     .scale = static_cast<float>(1 / (1 - p)),
                     .dtype = dtype},
                    current_stream(x));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) { m.impl("dropout_fwd", TORCH_BOX(&dropout_fwd)); }

}  // namespace cs336
