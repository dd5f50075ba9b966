// torch.ops.cs336.fp8_copies on CUDA: check, guard, allocate, launch.
#include "kernels/fp8_copies.h"

#include <tuple>

#include "ops/tensor.h"

namespace cs336 {
namespace {

std::tuple<Tensor, Tensor, Tensor> fp8_copies(Tensor x, bool gradient) {
  const Dtype x_dtype = float_dtype_of(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be (N, K), contiguous");
  const int64_t N = x.size(0), K = x.size(1);
  STD_TORCH_CHECK(N % cuda::kFp8Side == 0 && K % cuda::kFp8Side == 0, "N and K must be multiples of 16");
  STD_TORCH_CHECK(N > 0 && K > 0 && N <= cuda::kFp8Rows, "N and K must be positive, and N at most ", cuda::kFp8Rows);
  const ScalarType format = gradient ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16) x = torch::stable::clone(x);
  const Tensor rounded = new_tensor(x, {N, K}, format), turned = new_tensor(x, {K, N}, format);
  const Tensor scale = new_tensor(x, {}, ScalarType::Float),
               largest = new_tensor(x, {cuda::kFp8Parts}, ScalarType::Int);
  cuda::fp8_copies({.x = x.const_data_ptr(),
                    .rounded = data_of(rounded),
                    .turned = data_of(turned),
                    .largest = static_cast<uint32_t*>(data_of(largest)),
                    .scale = static_cast<float*>(data_of(scale)),
                    .rows = N,
                    .columns = K,
                    .x_dtype = x_dtype,
                    .dtype = gradient ? Dtype::F8E5M2 : Dtype::F8E4M3},
                   current_stream(x));
  return {rounded, turned, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) { m.impl("fp8_copies", TORCH_BOX(&fp8_copies)); }

}  // namespace cs336
