#pragma once
#include <cuda_runtime.h>

#include <span>

#include "common/adamw.h"

namespace cs336 {

// Updates all tensors (device memory, numel > 0): one launch for each pair of dtypes that occurs and each kMaxTensors
// of them. The gradients are multiplied by *grad_scale (device memory) where it is not null.
void adamw(std::span<const AdamwTensor> tensors, const float* grad_scale, const AdamwCoefficients& coefficients,
           cudaStream_t stream);

}  // namespace cs336
