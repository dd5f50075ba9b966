#include "kernels/linear_many_rows/linear_many_rows_launch.cuh"

namespace cs336::many_rows {

template void launch_format<WeightFormat::kInt4, false>(const LinearFewRowsParams&, cudaStream_t);

}  // namespace cs336::many_rows
