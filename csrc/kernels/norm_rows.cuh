// A thread's place in the rows of norm_fwd and norm_bwd, and how it reads and writes them.
#pragma once
#include <cstdint>

#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "kernels/norm_plan.h"

namespace cs336::cuda {

// One thread's place.
template <typename T, Span kSpan>
struct Place {
  const int width;  // threads of a row in the cluster
  int mine;         // this one among them
  const int rows_per_block, in_block;
  const int first, stride;  // this block's first row group, and the distance to its next
  const int M, N;

  // Divisions by what is only known at run time take a while, before the first load: none but kWarps', once a kernel.
  __device__ Place(int64_t M, int64_t N, const RowLayout& layout)
      : width(layout.lanes * layout.cluster),
        mine(kSpan == Span::kLanes   ? static_cast<int>(threadIdx.x) & (layout.lanes - 1)
             : kSpan == Span::kWarps ? static_cast<int>(threadIdx.x) % layout.lanes
                                     : static_cast<int>(threadIdx.x) + cluster_rank() * layout.lanes),
        rows_per_block(kSpan == Span::kLanes   ? static_cast<int>(blockDim.x) >> layout.log2_lanes
                       : kSpan == Span::kWarps ? static_cast<int>(blockDim.x) / layout.lanes
                                               : 1),
        in_block(kSpan == Span::kLanes   ? static_cast<int>(threadIdx.x) >> layout.log2_lanes
                 : kSpan == Span::kWarps ? static_cast<int>(threadIdx.x) / layout.lanes
                                         : 0),
        first(kSpan == Span::kBlock ? cluster_index() : static_cast<int>(blockIdx.x)),
        stride(kSpan == Span::kBlock ? num_clusters() : static_cast<int>(gridDim.x)),
        M(static_cast<int>(M)),
        N(static_cast<int>(N)) {}

  __device__ __forceinline__ int row(int group) const { return group * rows_per_block + in_block; }
  __device__ __forceinline__ int column(int v) const { return (v * width + mine) * kVec<T>; }
  __device__ __forceinline__ bool has(int v) const { return column(v) < N; }
};

// As many of the features (N,) from `column` on as rows of T have in 16 bytes; the features are float or T.
template <typename T, Access kAccess = Access::kVectors>
__device__ __forceinline__ void load_features(float (&out)[kVec<T>], const void* features, bool is_float, int column) {
  if (is_float) {
#pragma unroll
    for (int i = 0; i < kVec<T>; i += 4) {
      float four[4];
      unpack<float>(load<float, kAccess>(features, column + i), four);
#pragma unroll
      for (int j = 0; j < 4; j++) out[i + j] = four[j];
    }
  } else {
    unpack<T>(load<T, kAccess>(features, column), out);
  }
}

template <typename T>
__device__ __forceinline__ float feature(const void* features, bool is_float, int64_t column) {
  return is_float ? static_cast<const float*>(features)[column] : to_float(static_cast<const T*>(features)[column]);
}

}  // namespace cs336::cuda
