// Linear layers on CUDA, of weights like x (few rows), int8, int4 and fp8: check, allocate, guard, launch.
#include "kernels/linear_few_rows/linear_few_rows.h"

#include <optional>

#include "kernels/linear_many_rows/linear_many_rows.h"
#include "ops/tensor.h"

namespace cs336 {
namespace {

using cuda::WeightFormat;

struct Format {
  ScalarType dtype;
  int per_byte;  // weights in an element
};

constexpr Format format_of(WeightFormat format, ScalarType x) {
  switch (format) {
    case WeightFormat::kInt8:
      return {ScalarType::Char, 1};
    case WeightFormat::kInt4:
      return {ScalarType::Byte, 2};
    case WeightFormat::kFp8:
      return {ScalarType::Float8_e4m3fn, 1};
    default:
      return {x, 1};
  }
}

// Rows that start at multiples of 16 bytes.
void check_aligned(const Tensor& t, const char* name) {
  const int bytes = size_of(dtype_of(t, name));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.size(1) * bytes % 16 == 0 &&
                      (t.size(0) <= 1 || t.stride(0) * bytes % 16 == 0),
                  "rows of ", name, " must start at multiples of 16 bytes");
}

void check_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, WeightFormat format) {
  check_rows(x, "x");
  check_rows(weight, "weight");
  const auto [dtype, per_byte] = format_of(format, x.scalar_type());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16,
                  "x must be float16 or bfloat16");
  const bool few = format == WeightFormat::kLikeX;
  STD_TORCH_CHECK(few || x.size(0) <= 1 || x.stride(0) != 0,
                  "x must have rows that lie apart, not one that is expanded");
  STD_TORCH_CHECK(few || weight.size(0) <= 1 || weight.stride(0) != 0,
                  "weight must have rows that lie apart, not one that is expanded");
  const int64_t most_rows = few ? cuda::kMostRows : INT32_MAX / 2;
  const int64_t most_features = few ? cuda::kMostFeatures : INT32_MAX / 2;
  STD_TORCH_CHECK(x.size(0) <= most_rows, "x must have at most ", most_rows, " rows, got ", x.size(0));
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(1) <= most_features, "x must have 1 to ", most_features, " features, got ",
                  x.size(1));
  STD_TORCH_CHECK(weight.scalar_type() == dtype && weight.size(1) * per_byte == x.size(1), "weight must be (N, ",
                  x.size(1) / per_byte, ") in this op's dtype");
  STD_TORCH_CHECK(weight.size(0) < INT32_MAX / 2, "weight must have fewer than 2^30 rows");
  check_device(weight, "weight", x);
  check_aligned(x, "x");
  check_aligned(weight, "weight");
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_contiguous(), "bias must be (",
                  weight.size(0), ",) and contiguous");
  STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "bias must have the dtype of x");
  check_device(*bias, "bias", x);
}

void check_groups(const Tensor& x, const Tensor& weight, const Tensor& scales, int64_t group,
                  const std::optional<Tensor>& zeros, WeightFormat format) {
  const int64_t N = weight.size(0), K = x.size(1), chunk = format == WeightFormat::kInt4 ? 128 : 64;
  STD_TORCH_CHECK(group >= K || (group >= 1 && group % chunk == 0), "group must be a multiple of ", chunk,
                  " or all features, got ", group);
  STD_TORCH_CHECK(scales.dim() == 2 && scales.size(0) == N && scales.size(1) == (K - 1) / group + 1,
                  "scales must be (N, ceil(K / group))");
  STD_TORCH_CHECK(N * scales.size(1) <= UINT32_MAX, "scales must be fewer than 2^32");
  STD_TORCH_CHECK(scales.is_contiguous(), "scales must be contiguous");
  float_dtype_of(scales, "scales");
  check_device(scales, "scales", x);
  if (!zeros) return;
  STD_TORCH_CHECK(zeros->dim() == 2 && zeros->size(0) == N && zeros->size(1) == scales.size(1) &&
                      zeros->scalar_type() == ScalarType::Short && zeros->is_contiguous(),
                  "zeros must be int16, contiguous and as scales");
  check_device(*zeros, "zeros", x);
}

Tensor product(const Tensor& x, const Tensor& weight, const Tensor* scales, const std::optional<Tensor>& bias,
               int64_t group, const std::optional<Tensor>& zeros, WeightFormat format, bool constant) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = new_tensor(x, {x.size(0), weight.size(0)}, x.scalar_type());
  const cuda::LinearFewRowsParams params{
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .scales = scales ? scales->const_data_ptr() : nullptr,
      .zeros = zeros ? static_cast<const int16_t*>(zeros->const_data_ptr()) : nullptr,
      .bias = bias ? bias->const_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
      .x_stride = x.stride(0),
      .weight_stride = weight.stride(0) * size_of(dtype_of(weight, "weight")),
      .M = static_cast<int>(x.size(0)),
      .N = static_cast<int>(weight.size(0)),
      .K = static_cast<int>(x.size(1)),
      .group = static_cast<int>(std::min(group, x.size(1))),
      .dtype = dtype_of(x, "x"),
      .scale_dtype = scales ? dtype_of(*scales, "scales") : Dtype::F32,
      .format = format,
      .constant = constant};
  const auto run = cuda::takes_many_rows(params) ? cuda::linear_many_rows : cuda::linear_few_rows;
  run(params, current_stream(x));
  return y;
}

Tensor linear_few_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool constant) {
  check_product(x, weight, bias, WeightFormat::kLikeX);
  return product(x, weight, nullptr, bias, 0, std::nullopt, WeightFormat::kLikeX, constant);
}

template <WeightFormat kFormat>
Tensor linear_quantized(const Tensor& x, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias,
                        int64_t group, const std::optional<Tensor>& zeros, bool constant) {
  check_product(x, weight, bias, kFormat);
  check_groups(x, weight, scales, group, zeros, kFormat);
  return product(x, weight, &scales, bias, group, zeros, kFormat, constant);
}

Tensor linear_fp8(const Tensor& x, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group, bool constant) {
  return linear_quantized<WeightFormat::kFp8>(x, weight, scales, bias, group, std::nullopt, constant);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) {
  m.impl("linear_few_rows", TORCH_BOX(&linear_few_rows));
  m.impl("linear_int8", TORCH_BOX(&linear_quantized<WeightFormat::kInt8>));
  m.impl("linear_int4", TORCH_BOX(&linear_quantized<WeightFormat::kInt4>));
  m.impl("linear_fp8", TORCH_BOX(&linear_fp8));
}

}  // namespace cs336
