// The parts of norm_bwd that are compiled apart.
#pragma once
#include "kernels/norm.h"

namespace cs336::cuda {

// dx, and num_partials rows of partial sums of dw and db, for rows of any length, stride and alignment.
void norm_bwd_any(const NormBwdParams& p, int num_partials, cudaStream_t stream);

// dw and db from num_partials rows of partial sums.
void norm_bwd_sum_partials(const NormBwdParams& p, int num_partials, cudaStream_t stream);

}  // namespace cs336::cuda
