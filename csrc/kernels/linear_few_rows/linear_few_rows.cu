#include "kernels/linear_few_rows/linear_few_rows.h"

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/nvtx.h"
#include "kernels/linear_few_rows/linear_few_rows_kernel.cuh"

namespace cs336::cuda {
namespace {

template <typename T, WeightFormat kFormat, int kEights>
void launch_for(const LinearFewRowsParams& p, cudaStream_t stream) {
  using S = few_rows::Shape<kFormat, kEights>;
  const int bytes = p.K * few_rows::Weights<T, kFormat>::kBytes / 32;
  const few_rows::Plan plan = few_rows::plan(few_rows::ceil_div(p.N, S::kRows),
                                             few_rows::ceil_div(bytes, few_rows::kChunkBytes), current_device().num_sms);
  const LaunchShape shape{.grid = dim3(plan.blocks),
                          .threads = dim3(few_rows::kThreads),
                          .shared_bytes = S::kSharedBytes,
                          .dependent = true};
  launch<few_rows::linear_few_rows_kernel<T, kFormat, kEights>>(shape, stream, p, plan);
}

}  // namespace

void linear_few_rows(const LinearFewRowsParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.M == 0 || p.N == 0) return;
  const auto of_rows = [&]<typename T>(T) {
    constexpr WeightFormat kFormat = WeightFormat::kLikeX;
    if (p.M <= 8) return launch_for<T, kFormat, 1>(p, stream);
    if (p.M <= 16) return launch_for<T, kFormat, 2>(p, stream);
    if (p.M <= 32) return launch_for<T, kFormat, 4>(p, stream);
    return launch_for<T, kFormat, 8>(p, stream);
  };
  if (p.dtype == Dtype::BF16) return of_rows(__nv_bfloat16());
  if (p.dtype == Dtype::F16) return of_rows(__half());
  throw std::invalid_argument("linear_few_rows takes float16 and bfloat16");
}

}  // namespace cs336::cuda
