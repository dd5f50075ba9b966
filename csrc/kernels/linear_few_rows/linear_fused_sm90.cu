// Linear layers of few rows that make their x themselves: of a norm, or of a gated activation.
#include "common/dispatch.h"
#include "common/nvtx.h"
#include "kernels/linear_few_rows/linear_few_rows_launch.cuh"

namespace cs336::cuda {

void linear_fused(const LinearFewRowsParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.M == 0 || p.N == 0) return;
  if (few_rows::rows_at_once(p.K, current_device().max_shared_bytes) < p.M)
    throw std::invalid_argument("linear_fused: the rows of x do not fit into shared memory");
  const auto of_dtype = [&]<typename T>(T) {
    if (p.prologue == Prologue::kNorm)
      return few_rows::launch_kernel<T, WeightFormat::kLikeX, 1, false, Prologue::kNorm>(p, stream);
    if (p.prologue == Prologue::kSwiglu)
      return few_rows::launch_kernel<T, WeightFormat::kLikeX, 1, false, Prologue::kSwiglu>(p, stream);
    throw std::invalid_argument("linear_fused takes a norm or a gate");
  };
  if (p.dtype == Dtype::BF16) return of_dtype(__nv_bfloat16());
  if (p.dtype == Dtype::F16) return of_dtype(__half());
  throw std::invalid_argument("linear_fused takes float16 and bfloat16");
}

}  // namespace cs336::cuda
