// Weights as a linear layer of few rows meets them: eight features of a row, from however few bits, as four pairs of
// x's dtype.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/vec.cuh"
#include "kernels/linear_few_rows/linear_few_rows.h"

namespace cs336::few_rows {

using cuda::WeightFormat;

__device__ __forceinline__ int slot_of(int g, int t);

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T, WeightFormat kFormat>
struct Weights;

template <typename T>
struct Weights<T, WeightFormat::kLikeX> {
  static constexpr int kBytes = 64;  // of 32 features
  static constexpr int kPieces = 1;  // of 32 features in 64 bytes

  // Features of x in the order in which `take` gives those of the weights.
  __device__ __forceinline__ static uint4 in_order(const uint4& x) { return x; }

  __device__ __forceinline__ static void take(uint32_t (&w)[4], const uint4* tile, int g, int t, int) {
    const uint4 v = tile[slot_of(g, t)];
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  }
};

}  // namespace cs336::few_rows
