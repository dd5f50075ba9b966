#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace cs336::cuda {

inline constexpr int kFp8Side = 16;           // rows and columns are multiples of it
inline constexpr int kFp8Rows = 65535 * 128;  // at most: a grid has so many tiles of rows
inline constexpr int kFp8Parts = 1024;        // the most whose largest magnitudes are kept apart

struct Fp8CopiesParams {
  const void* x;           // (rows, columns), contiguous, at a multiple of 16 bytes
  void *rounded, *turned;  // (rows, columns), (columns, rows)
  uint32_t* largest;       // kFp8Parts of scratch
  float* scale;            // one number
  int64_t rows, columns;
  Dtype x_dtype, dtype;  // dtype: F8E4M3 or F8E5M2
};

void fp8_copies(const Fp8CopiesParams& p, cudaStream_t stream);

}  // namespace cs336::cuda
