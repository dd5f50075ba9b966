// RMSNorm and LayerNorm on CUDA.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace cs336::cuda {

struct NormFwdParams {
  const void* x;         // (M, N)
  const void* residual;  // (M, N) or null; the norm is taken of x + residual, rounded to x's dtype
  const void* w;         // (N,)
  const void* b;         // (N,) or null
  void* y;               // (M, N) contiguous
  void* sum;             // (M, N) contiguous, x + residual
  float* mean;           // (M,), LayerNorm only
  float* rstd;           // (M,)
  int64_t M, N;
  int64_t x_stride, residual_stride;  // of rows, in elements
  float eps;
  bool centred;   // LayerNorm; else RMSNorm
  Dtype dtype;    // of x, residual, y, sum
  Dtype w_dtype;  // of w, b: dtype or F32
};

struct NormBwdParams {
  const void* dy;     // (M, N)
  const void* dsum;   // (M, N) or null; added to dx
  const void* x;      // (M, N)
  const void* w;      // (N,)
  const float* mean;  // (M,), LayerNorm only
  const float* rstd;  // (M,)
  void* dx;           // (M, N) contiguous
  void* dw;           // (N,)
  void* db;           // (N,), LayerNorm only
  float* partials;    // norm_bwd_workspace(p) floats, 16-byte aligned
  int64_t M, N;
  int64_t dy_stride, dsum_stride, x_stride;
  bool centred;   // LayerNorm; else RMSNorm
  Dtype dtype;    // of dy, dsum, x, dx
  Dtype w_dtype;  // of w, dw, db: dtype or F32
};

void norm_fwd(const NormFwdParams& p, cudaStream_t stream);
void norm_bwd(const NormBwdParams& p, cudaStream_t stream);

// On the current device; p.partials need not be set.
int64_t norm_bwd_workspace(const NormBwdParams& p);

}  // namespace cs336::cuda
