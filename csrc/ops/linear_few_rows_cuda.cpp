// torch.ops.cs336.linear_few_rows on CUDA: check, allocate, guard, launch.
#include "kernels/linear_few_rows/linear_few_rows.h"

#include <optional>

#include "ops/tensor.h"

namespace cs336 {
namespace {

bool is_aligned(const Tensor& t) {  // all rows at multiples of 16 bytes
  const auto bytes = [&](int64_t elements) { return elements * size_of(dtype_of(t, "x")) % 16; };
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && bytes(t.size(1)) == 0 &&
         (t.size(0) <= 1 || bytes(t.stride(0)) == 0);
}

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_rows(x, "x");
  check_rows(weight, "weight");
  const Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(dtype == Dtype::F16 || dtype == Dtype::BF16, "x must be float16 or bfloat16");
  STD_TORCH_CHECK(x.size(0) <= cuda::kMostRows, "x must have at most ", cuda::kMostRows, " rows, got ", x.size(0));
  STD_TORCH_CHECK(weight.size(0) <= INT32_MAX - 64 && x.size(1) <= INT32_MAX / 4, "weight must have fewer than 2^31 rows and 2^29 features");
  check_device(weight, "weight", x);
  STD_TORCH_CHECK(is_aligned(x) && is_aligned(weight), "rows of x and weight must start at multiples of 16 bytes");
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must have shape (", weight.size(0), ",)");
  STD_TORCH_CHECK(bias->is_contiguous() && bias->scalar_type() == x.scalar_type(), "bias must be contiguous in x's dtype");
  check_device(*bias, "bias", x);
}

Tensor linear_few_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x, weight, bias);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "weight must be (N, ", x.size(1), ")");
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = new_tensor(x, {x.size(0), weight.size(0)}, x.scalar_type());
  cuda::linear_few_rows({.x = x.const_data_ptr(),
                         .weight = weight.const_data_ptr(),
                         .scales = nullptr,
                         .zeros = nullptr,
                         .bias = bias ? bias->const_data_ptr() : nullptr,
                         .y = y.mutable_data_ptr(),
                         .x_stride = x.stride(0),
                         .weight_stride = weight.stride(0) * size_of(dtype_of(weight, "weight")),
                         .M = static_cast<int>(x.size(0)),
                         .N = static_cast<int>(weight.size(0)),
                         .K = static_cast<int>(x.size(1)),
                         .group = 0,
                         .dtype = dtype_of(x, "x"),
                         .scale_dtype = Dtype::F32,
                         .format = cuda::WeightFormat::kLikeX},
                        static_cast<cudaStream_t>(current_stream(x)));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) { m.impl("linear_few_rows", TORCH_BOX(&linear_few_rows)); }

}  // namespace cs336
