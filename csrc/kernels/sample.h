// Sampling of next tokens on CUDA.
#pragma once
#include <cuda_runtime.h>

#include "common/sample_params.h"

namespace cs336 {

inline constexpr int kSampleCluster = 8;              // blocks that hold a row in their shared memory
inline constexpr int kMaxVocabulary = 8 * 48 * 1024;  // what fits there

void sample(const SampleParams& p, cudaStream_t stream);  // compute capability 9.0

}  // namespace cs336
