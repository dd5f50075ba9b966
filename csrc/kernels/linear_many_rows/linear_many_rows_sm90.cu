// Which format has its kernels where.
#include "kernels/linear_many_rows/linear_many_rows.h"

#include "common/nvtx.h"
#include "kernels/linear_few_rows/linear_few_rows_plan.h"
#include "kernels/linear_many_rows/linear_many_rows_launch.cuh"

namespace cs336::cuda {

bool takes_many_rows(const LinearFewRowsParams& p) {
  return p.format != WeightFormat::kLikeX &&
         (p.K > kMostFeatures || p.M > few_rows::rows_at_once(p.K, current_device().max_shared_bytes));
}

void linear_many_rows(const LinearFewRowsParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.M == 0 || p.N == 0) return;
  switch (p.format) {
    case WeightFormat::kLikeX:
      throw std::invalid_argument("linear_many_rows takes weights of int8, int4 and fp8");
    case WeightFormat::kInt8:
      return p.zeros ? many_rows::launch_format<WeightFormat::kInt8, true>(p, stream)
                     : many_rows::launch_format<WeightFormat::kInt8, false>(p, stream);
    case WeightFormat::kInt4:
      return p.zeros ? many_rows::launch_format<WeightFormat::kInt4, true>(p, stream)
                     : many_rows::launch_format<WeightFormat::kInt4, false>(p, stream);
    case WeightFormat::kFp8:
      return many_rows::launch_format<WeightFormat::kFp8, false>(p, stream);
  }
}

}  // namespace cs336::cuda
