// Weights of x's dtype; and which format has its kernels where.
#include "kernels/linear_few_rows/linear_few_rows.h"

#include "common/nvtx.h"
#include "kernels/linear_few_rows/linear_few_rows_launch.cuh"

namespace cs336::cuda {

void linear_few_rows(const LinearFewRowsParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.M == 0 || p.N == 0) return;
  switch (p.format) {
    case WeightFormat::kLikeX:
      return few_rows::launch_format<WeightFormat::kLikeX>(p, stream);
    case WeightFormat::kInt8:
      return few_rows::launch_format<WeightFormat::kInt8>(p, stream);
    case WeightFormat::kInt4:
      return few_rows::launch_format<WeightFormat::kInt4>(p, stream);
    case WeightFormat::kFp8:
      return few_rows::launch_format<WeightFormat::kFp8>(p, stream);
  }
}

}  // namespace cs336::cuda
