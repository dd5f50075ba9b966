// Weights of x's dtype; and which format has its kernels where.
#include "kernels/linear_few_rows/linear_few_rows.h"

#include "common/nvtx.h"
#include "kernels/linear_few_rows/linear_few_rows_launch.cuh"

namespace cs336::cuda {

namespace {

void some_rows(const LinearFewRowsParams& p, cudaStream_t stream) {
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

}  // namespace

void linear_few_rows(const LinearFewRowsParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.M == 0 || p.N == 0) return;
  const int most = few_rows::rows_at_once(p.K, current_device().max_shared_bytes);
  if (most == 0) throw std::invalid_argument("linear_few_rows: a row of x does not fit into shared memory");
  const int times = few_rows::ceil_div(p.M, most), rows = few_rows::ceil_div(p.M, times);
  for (int first = 0; first < p.M; first += rows) {
    LinearFewRowsParams part = p;
    part.M = std::min(rows, p.M - first);
    part.x = static_cast<const char*>(p.x) + first * p.x_stride * size_of(p.dtype);
    part.y = static_cast<char*>(p.y) + static_cast<int64_t>(first) * p.N * size_of(p.dtype);
    some_rows(part, stream);
  }
}

}  // namespace cs336::cuda
