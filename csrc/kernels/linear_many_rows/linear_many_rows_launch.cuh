// The launcher of one format of weights: the file of each format holds its kernels.
#pragma once
#include <stdexcept>

#include "common/launch.h"
#include "common/tensor_map.h"
#include "kernels/linear_many_rows/linear_many_rows_kernel.cuh"

namespace cs336::many_rows {

// Of rows that begin `stride` bytes from each other (of one row that says nothing), for copies of box_rows x
// box_columns.
inline CUtensorMap map_of_rows(const void* rows, CUtensorMapDataType type, int64_t stride, int64_t num_rows,
                               int64_t columns, int box_rows, int box_columns, CUtensorMapSwizzle swizzle) {
  const uint64_t sizes[5] = {uint64_t(columns), uint64_t(num_rows), 1, 1, 1};
  const uint64_t strides[4] = {num_rows > 1 ? uint64_t(stride) : 16, 16, 16, 16};
  const uint32_t box[5] = {uint32_t(box_columns), uint32_t(box_rows), 1, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode_tiled()(&map, type, 5, const_cast<void*>(rows), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("linear_many_rows: no tensor map for these rows");
  return map;
}

template <class Tile>
LaunchShape shape_of(int split, int clusters) {
  return {.grid = dim3(clusters * split),
          .threads = dim3(Tile::kThreads),
          .shared_bytes = Tile::kSharedBytes,
          .cluster = dim3(split),
          .dependent = true};
}

// What the device holds of each split: one block a multiprocessor, and clusters as its parts have room for them.
template <class Tile>
Resident resident() {
  Resident clusters = {current_device().num_sms};
  for (int i = 1; i < kNumSplits; i++)
    clusters[i] = max_resident_clusters<linear_many_rows_kernel<Tile>>(shape_of<Tile>(kSplits[i], 1));
  return clusters;
}

template <class Tile>
Plan plan_of(const LinearFewRowsParams& p) {
  const int64_t tiles = ceil_div(p.M, Tile::kCols) * ceil_div(p.N, Tile::kRows);
  return plan(tiles, ceil_div(p.K, kStepFeatures), resident<Tile>());
}

template <class Tile>
void launch_tile(const LinearFewRowsParams& p, cudaStream_t stream) {
  constexpr bool kBf16 = std::is_same_v<typename Tile::T, __nv_bfloat16>;
  const int64_t tiles_of_x = ceil_div(p.M, Tile::kCols);
  const Plan shared_by = plan_of<Tile>(p);
  const int64_t row_bytes = static_cast<int64_t>(p.K) * Tile::kRowBytes / kStepFeatures;
  const Args args{.x = map_of_rows(p.x, kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                   p.x_stride * 2, p.M, p.K, Tile::kCols, 64, CU_TENSOR_MAP_SWIZZLE_128B),
                  .weight = map_of_rows(p.weight, CU_TENSOR_MAP_DATA_TYPE_UINT8, p.weight_stride, p.N, row_bytes,
                                        Tile::kRows, Tile::kRowBytes,
                                        Tile::kRowBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B),
                  .scales = p.scales,
                  .zeros = p.zeros,
                  .bias = p.bias,
                  .y = p.y,
                  .M = p.M,
                  .N = p.N,
                  .group = p.group,
                  .groups = static_cast<int>(ceil_div(p.K, p.group)),
                  .steps = static_cast<int>(ceil_div(p.K, kStepFeatures)),
                  .split = shared_by.split,
                  .tiles = tiles_of_x * ceil_div(p.N, Tile::kRows),
                  .tiles_of_x = tiles_of_x,
                  .scale_dtype = p.scale_dtype,
                  .constant = p.constant};
  launch<linear_many_rows_kernel<Tile>>(shape_of<Tile>(shared_by.split, shared_by.clusters), stream, args);
}

template <typename T, WeightFormat kFormat, bool kZeros>
void launch_zeros(const LinearFewRowsParams& p, cudaStream_t stream) {
  using Narrow = Tile<T, kFormat, kZeros, 32, 4>;
  using Middle = Tile<T, kFormat, kZeros, 64, 2>;
  using Wide = Tile<T, kFormat, kZeros, 128, 2>;
  if (p.M <= Narrow::kCols) return launch_tile<Narrow>(p, stream);
  if (p.M <= Middle::kCols || middle_is_faster(plan_of<Middle>(p), plan_of<Wide>(p)))
    return launch_tile<Middle>(p, stream);
  return launch_tile<Wide>(p, stream);
}

template <WeightFormat kFormat, bool kZeros>
void launch_format(const LinearFewRowsParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::BF16) return launch_zeros<__nv_bfloat16, kFormat, kZeros>(p, stream);
  if (p.dtype == Dtype::F16) return launch_zeros<__half, kFormat, kZeros>(p, stream);
  throw std::invalid_argument("linear_many_rows takes float16 and bfloat16");
}

extern template void launch_format<WeightFormat::kInt8, false>(const LinearFewRowsParams&, cudaStream_t);
extern template void launch_format<WeightFormat::kInt8, true>(const LinearFewRowsParams&, cudaStream_t);
extern template void launch_format<WeightFormat::kInt4, false>(const LinearFewRowsParams&, cudaStream_t);
extern template void launch_format<WeightFormat::kInt4, true>(const LinearFewRowsParams&, cudaStream_t);
extern template void launch_format<WeightFormat::kFp8, false>(const LinearFewRowsParams&, cudaStream_t);

}  // namespace cs336::many_rows
