#pragma once
#include <cuda_runtime.h>

#include <span>

#include "common/adamw.h"
#include "kernels/sharded_adamw_plan.h"

namespace cs336::cuda {

constexpr int kSquares = 256;  // partial sums of squares of a bucket

struct ShardedAdamwParams {  // one shard: float32 or bfloat16 weights and gradients, 16-byte aligned
  void* p;                   // (numel,)
  const void* g;             // (numel,) of p's dtype
  int16_t* remainder;        // (numel,) the low halves of float32 weights whose high ones are p, or null
  float *m, *v;              // (numel,)
  const float* steps;        // (parameters,) from 1
  const float* used;         // (parameters,) where it is 0 the parameter and its state stay as they are
  std::span<const Piece> pieces;
  Dtype dtype;
};

// squares (kSquares,): partial sums, in an order that numel alone decides; in float64 that order shows in hardly
// any of the total's float32 bits. numel is a multiple of kShardAlign.
void sum_squares(const void* x, int64_t numel, Dtype dtype, double* squares, cudaStream_t stream);

// total (1,) = the sum of x (numel,), in a fixed order.
void sum_partials(const double* x, int64_t numel, float* total, cudaStream_t stream);

// One launch for each kMaxPieces pieces.
void sharded_adamw(const ShardedAdamwParams& p, const AdamwHyper& hyper, cudaStream_t stream);

}  // namespace cs336::cuda
