#include "kernels/linear_few_rows/linear_few_rows_launch.cuh"

namespace cs336::few_rows {

template void launch_format<WeightFormat::kFp8>(const LinearFewRowsParams&, cudaStream_t);

}  // namespace cs336::few_rows
