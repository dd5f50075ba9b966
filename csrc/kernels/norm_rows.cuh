// How the rows of norm_fwd and norm_bwd lie over threads. A row's 16-byte vectors are dealt to its threads in turn.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <initializer_list>

#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace cs336 {

struct RowLayout {
  int vecs = 0;        // 16-byte vectors per thread; 0: the rows cannot be walked in vectors
  int lanes = 1;       // threads per row in one block: a power of two up to 32, or a multiple of 32
  int log2_lanes = 0;  // of a power of two
  int threads = 1;     // per block, a multiple of lanes; equal if cluster > 1
  int cluster = 1;     // blocks per row
  int blocks = 1;

  int rows_per_block() const { return threads / lanes; }
  void set_lanes(int count) {
    lanes = count;
    log2_lanes = std::countr_zero(static_cast<unsigned>(count));
  }
};

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Whether rows of N elements, these strides and these first elements all start at multiples of 16 bytes. M is limited
// so that the number of a row, and a few grids more, is an int.
inline bool takes_vectors(int64_t M, int64_t N, int64_t element_size, std::initializer_list<int64_t> strides,
                          std::initializer_list<const void*> pointers) {
  const auto aligned = [&](int64_t elements) { return elements * element_size % 16 == 0; };
  return M < (int64_t{1} << 30) && N < (int64_t{1} << 30) && aligned(N) &&
         (M <= 1 || std::all_of(strides.begin(), strides.end(), aligned)) &&
         std::all_of(
             pointers.begin(), pointers.end(), [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

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

// Not through the read-only path (__ldg): a predecessor may still be writing when the kernel starts.
template <typename T>
__device__ __forceinline__ uint4 load(const void* global, int64_t element) {
  return *reinterpret_cast<const uint4*>(static_cast<const T*>(global) + element);
}

template <typename T>
__device__ __forceinline__ void store(void* global, int64_t element, const uint4& packed) {
  *reinterpret_cast<uint4*>(static_cast<T*>(global) + element) = packed;
}

// As many of the features (N,) from `column` on as rows of T have in 16 bytes; the features are float or T.
template <typename T>
__device__ __forceinline__ void load_features(float (&out)[kVec<T>], const void* features, bool is_float, int column) {
  if (is_float) {
#pragma unroll
    for (int i = 0; i < kVec<T>; i += 4) {
      float four[4];
      unpack<float>(load<float>(features, column + i), four);
#pragma unroll
      for (int j = 0; j < 4; j++) out[i + j] = four[j];
    }
  } else {
    unpack<T>(load<T>(features, column), out);
  }
}

template <typename T>
__device__ __forceinline__ float feature(const void* features, bool is_float, int64_t column) {
  return is_float ? static_cast<const float*>(features)[column] : to_float(static_cast<const T*>(features)[column]);
}

}  // namespace cs336
