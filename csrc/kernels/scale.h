#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace cs336::cuda {

struct ScaleParams {
  const void* x;       // (numel,); null: out itself, which a scale of 1 leaves alone
  void* out;           // (numel,)
  const float* scale;  // one number
  int64_t numel;
  Dtype x_dtype, out_dtype;  // equal without x
};

void scale(const ScaleParams& p, cudaStream_t stream);

}  // namespace cs336::cuda
