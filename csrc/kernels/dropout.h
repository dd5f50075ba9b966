#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace cs336::cuda {

struct DropoutParams {
  const void* x;         // (numel,), as all
  const void* residual;  // or null
  void* y;
  const int64_t* seed;  // one number
  int64_t numel;
  uint32_t below;  // words below it are dropped
  float scale;     // of what stays
  Dtype dtype;
};

void dropout_fwd(const DropoutParams& p, cudaStream_t stream);

}  // namespace cs336::cuda
