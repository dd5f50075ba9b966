#pragma once
#include <cuda_runtime.h>

#include <span>

#include "common/adamw.h"

namespace cs336::cuda {

// Updates all tensors (device memory, numel > 0): one launch for each pair of dtypes that occurs and each kMaxTensors
// of them. Step, learning rate and gradient scale are read on the device, so a captured graph takes new ones.
void adamw(std::span<const AdamwTensor> tensors, const AdamwHyper& hyper, cudaStream_t stream);

}  // namespace cs336::cuda
