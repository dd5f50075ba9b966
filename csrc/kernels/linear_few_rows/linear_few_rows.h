// Linear layers of few rows on CUDA: y = x w^T + b, in the time that the weights take to be read.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace cs336::cuda {

enum class WeightFormat { kLikeX, kInt8, kInt4, kFp8 };

struct LinearFewRowsParams {
  const void* x;          // (M, K)
  const void* weight;     // (N, K) of 2, 1 or half a byte
  const void* scales;     // (N, ceil(K / group)), or null: of kLikeX
  const int16_t* zeros;   // like scales, or null
  const void* bias;       // (N,) like x, or null
  void* y;                // (M, N), contiguous
  int64_t x_stride;       // in elements; all rows of x and of weight start at multiples of 16 bytes
  int64_t weight_stride;  // in bytes
  int M, N, K;            // M <= kMostRows, K <= kMostFeatures
  int group;              // a multiple of the features in 64 bytes of weights, or K
  Dtype dtype;            // of x, bias and y: F16 or BF16
  Dtype scale_dtype;
  WeightFormat format;
  bool constant;  // the kernel before this one does not write the weights: they are read while it still runs
};

inline constexpr int kMostRows = 64;
inline constexpr int kMostFeatures = 57344;  // of a row of x, which is kept in shared memory
inline constexpr int kFeatures = 32;         // of a piece of a row: what four lanes take of it

// Of more rows than fit into shared memory some at a time: each reads the weights.
void linear_few_rows(const LinearFewRowsParams& p, cudaStream_t stream);

}  // namespace cs336::cuda
