// What a block makes of the rows of x before it multiplies them, as a kernel of its own would have written it: one
// kernel less that waits for the one ahead of it. Every block does all rows; there are few.
#pragma once
#include "common/async.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "kernels/linear_few_rows/linear_few_rows.h"
#include "kernels/linear_few_rows/linear_few_rows_plan.h"

namespace cs336::few_rows {

using cuda::LinearFewRowsParams;

// kept (M, x_vectors(K)) = (x + other) * rsqrt(mean square + eps) * norm_weight, zeros behind the last feature. Block 0
// writes x + other. squares: a float a warp.
template <typename T>
__device__ void keep_normed(const LinearFewRowsParams& p, uint4* kept, float* squares) {
  int warps = kWarps;  // of a row
  while (kWarps / warps < p.M) warps /= 2;
  const int warp = threadIdx.x / 32, m = warp / warps, first = warp % warps * 32 + threadIdx.x % 32;
  const int vectors = p.K / kVec<T>;
  uint4* row = kept + m * x_vectors(p.K);
  float values[kVec<T>], other[kVec<T>], square[1] = {0.f};
  if (m < p.M) {
    for (int v = first; v < x_vectors(p.K); v += warps * 32) {
      if (v >= vectors) {
        row[v] = {0, 0, 0, 0};
        continue;
      }
      const int64_t k = v * kVec<T>;
      unpack<T>(load<T>(p.x, m * p.x_stride + k), values);
      unpack<T>(load<T>(p.other, m * p.other_stride + k), other);
#pragma unroll
      for (int i = 0; i < kVec<T>; i++) values[i] += other[i];
      row[v] = pack<T>(values);
      if (blockIdx.x == 0) store<T>(p.sum, static_cast<int64_t>(m) * p.K + k, row[v]);
      unpack<T>(row[v], values);  // as rounded
#pragma unroll
      for (int i = 0; i < kVec<T>; i++) square[0] += values[i] * values[i];
    }
  }
  warp_sum(square);
  if (threadIdx.x % 32 == 0) squares[warp] = square[0];
  __syncthreads();
  if (m < p.M) {
    float total = 0.f;
    for (int i = 0; i < warps; i++) total += squares[m * warps + i];
    const float rstd = rsqrtf(total / static_cast<float>(p.K) + p.eps);
    for (int v = first; v < vectors; v += warps * 32) {
      unpack<T>(row[v], values);
      unpack<T>(load<T>(p.norm_weight, v * kVec<T>), other);
#pragma unroll
      for (int i = 0; i < kVec<T>; i++) values[i] = values[i] * rstd * other[i];
      row[v] = pack<T>(values);
    }
  }
  __syncthreads();
}

// kept (M, x_vectors(K)) = silu(x) * other, zeros behind the last feature.
template <typename T>
__device__ void keep_gated(const LinearFewRowsParams& p, uint4* kept) {
  const int row = x_vectors(p.K);
  for (int at = threadIdx.x; at < p.M * row; at += kWarps * 32) {
    const int m = at / row, k = (at - m * row) * kVec<T>;
    float gate[kVec<T>] = {}, up[kVec<T>] = {};
    if (k < p.K) {
      unpack<T>(load<T>(p.x, m * p.x_stride + k), gate);
      unpack<T>(load<T>(p.other, m * p.other_stride + k), up);
    }
#pragma unroll
    for (int i = 0; i < kVec<T>; i++) gate[i] = __fdividef(gate[i], 1.f + __expf(-gate[i])) * up[i];
    kept[at] = pack<T>(gate);
  }
  __syncthreads();
}

}  // namespace cs336::few_rows
