// Rotary position embedding on CUDA.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace cs336::cuda {

struct RopeHeads {                       // of q, or of k
  const void* x;                         // (B, H, S, D), contiguous in its last dim
  void* y;                               // likewise
  int64_t x_b, x_h, x_s, y_b, y_h, y_s;  // strides, in elements
  int H;
};

struct RopeParams {
  RopeHeads heads[2];      // H = 0 where there is but one
  const float *cos, *sin;  // (L, P) beside positions, else (B, S, P); contiguous in their last dim
  const void* positions;   // (B, S) int64 or int32, or null
  int64_t table_b, table_s, position_b, position_s;  // strides, in elements; 0 where sequences share them
  int64_t L;
  int B, S, D, P;  // B S < 2^31, 2 P <= D <= kMaxRopeDim
  bool wide_positions, interleaved, inverse;
  Dtype dtype;
};

inline constexpr int kMaxRopeDim = 1024;

// Turns the first 2 P features, back if inverse, and copies the others.
void rope(const RopeParams& p, cudaStream_t stream);

}  // namespace cs336::cuda
