// The launcher of one format of weights: the file of each format holds its kernels.
#pragma once
#include <stdexcept>

#include "common/launch.h"
#include "kernels/linear_few_rows/linear_few_rows_kernel.cuh"

namespace cs336::few_rows {

template <typename T, WeightFormat kFormat, int kEights, bool kZeros = false>
void launch_kernel(const LinearFewRowsParams& p, cudaStream_t stream) {
  using S = Shape<kFormat, kEights>;
  const int steps = ceil_div(bytes_of_row<T, kFormat>(p.K), S::kChunks * kChunkBytes);
  const Plan shared_by = plan(ceil_div(p.N, S::kRows), steps, current_device().num_sms);
  const LaunchShape shape{.grid = dim3(shared_by.blocks),
                          .threads = dim3(kThreads),
                          .shared_bytes = static_cast<size_t>(shared_bytes(p.M, p.K)),
                          .dependent = true};
  launch<linear_few_rows_kernel<T, kFormat, kEights, kZeros>>(shape, stream, p, shared_by);
}

template <WeightFormat kFormat>
void launch_format(const LinearFewRowsParams& p, cudaStream_t stream) {
  const auto of_dtype = [&]<typename T>(T) {
    if constexpr (kFormat == WeightFormat::kInt8 || kFormat == WeightFormat::kInt4) {
      if (p.zeros && p.M <= 8) return launch_kernel<T, kFormat, 1, true>(p, stream);
      if (p.zeros) return launch_kernel<T, kFormat, 2, true>(p, stream);
    }
    if (p.M <= 8) return launch_kernel<T, kFormat, 1>(p, stream);
    return launch_kernel<T, kFormat, 2>(p, stream);
  };
  if (p.dtype == Dtype::BF16) return of_dtype(__nv_bfloat16());
  if (p.dtype == Dtype::F16) return of_dtype(__half());
  throw std::invalid_argument("linear_few_rows takes float16 and bfloat16");
}

extern template void launch_format<WeightFormat::kInt8>(const LinearFewRowsParams&, cudaStream_t);
extern template void launch_format<WeightFormat::kInt4>(const LinearFewRowsParams&, cudaStream_t);
extern template void launch_format<WeightFormat::kFp8>(const LinearFewRowsParams&, cudaStream_t);

}  // namespace cs336::few_rows
