#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace cs336::cuda {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu2 };

struct ActivationParams {
  const void* x;   // (M, N)
  const void* up;  // (M, N) or null: without a gate
  const void* dy;  // (M, N), of the backward
  void* y;         // (M, N): act(x) * up, or of the backward dx
  void* dup;       // (M, N), of the backward with up
  int64_t M, N;
  int64_t x_stride, up_stride, dy_stride, out_stride;  // of rows, in elements; the last of y and dup
  Dtype dtype;
  Activation activation;
};

void activation_fwd(const ActivationParams& p, cudaStream_t stream);
void activation_bwd(const ActivationParams& p, cudaStream_t stream);

}  // namespace cs336::cuda
