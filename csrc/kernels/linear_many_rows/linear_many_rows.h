// Linear layers of int8, int4 and fp8 weights on CUDA, of more rows than linear_few_rows reads the weights once for.
#pragma once
#include "kernels/linear_few_rows/linear_few_rows.h"

namespace cs336::cuda {

// Whether linear_few_rows would read the weights more than once, or does not take such rows.
bool takes_many_rows(const LinearFewRowsParams& p);

// Any number of rows and features; scales as linear_few_rows takes them.
void linear_many_rows(const LinearFewRowsParams& p, cudaStream_t stream);

}  // namespace cs336::cuda
