// RMSNorm and LayerNorm on the CPU. Every call does a range of the work, so that a caller's threads can share it; the
// results do not depend on how the ranges are cut.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace cs336::cpu {

struct NormFwdParams {
  const void* x;         // (M, N)
  const void* residual;  // (M, N) or null; the norm is taken of x + residual, rounded to x's dtype
  const float* w;        // (N,)
  const float* b;        // (N,) or null
  void* y;               // (M, N) contiguous
  void* sum;             // (M, N) contiguous, x + residual
  float* mean;           // (M,), LayerNorm only
  float* rstd;           // (M,)
  int64_t N;
  int64_t x_stride, residual_stride;  // of rows, in elements
  float eps;
  bool centred;  // LayerNorm; else RMSNorm
  Dtype dtype;   // of x, residual, y, sum
};

struct NormBwdParams {
  const void* dy;       // (M, N)
  const void* dsum;     // (M, N) or null; added to dx
  const void* x;        // (M, N)
  const float* w;       // (N,)
  const float* mean;    // (M,); null makes it an RMSNorm
  const float* rstd;    // (M,)
  void* dx;             // (M, N) contiguous
  float* dw_partials;   // (num_chunks, N)
  float* db_partials;   // (num_chunks, N), LayerNorm only
  int64_t M, N, chunk;  // rows, features, rows per chunk
  int64_t dy_stride, dsum_stride, x_stride;
  bool centred;  // LayerNorm; else RMSNorm
  Dtype dtype;   // of dy, dsum, x, dx
};

void norm_fwd(const NormFwdParams& p, int64_t first_row, int64_t last_row);
void norm_bwd(const NormBwdParams& p, int64_t first_chunk, int64_t last_chunk);

// out[n] = sum over chunks of partials[chunk][n], for n in [begin, end); out is in dtype.
void norm_bwd_reduce(const float* partials, int64_t num_chunks, int64_t N, int64_t begin, int64_t end, void* out,
                     Dtype dtype);

void to_floats(const void* src, Dtype dtype, int64_t n, float* dst);

}  // namespace cs336::cpu
