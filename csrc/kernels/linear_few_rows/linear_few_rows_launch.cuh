// The launcher of one format of weights: the file of each format holds its kernels.
#pragma once
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/tensor_map.h"
#include "kernels/linear_few_rows/linear_few_rows_kernel.cuh"

namespace cs336::few_rows {

// For copies of kStepWidth bytes of kTileRows rows.
inline CUtensorMap weight_map(const LinearFewRowsParams& p, int row_bytes) {
  const uint64_t sizes[2] = {uint64_t(row_bytes), uint64_t(p.N)};
  const uint64_t strides[1] = {p.N > 1 ? uint64_t(p.weight_stride) : uint64_t(row_bytes)};
  const uint32_t box[2] = {kStepWidth, kTileRows}, steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(p.weight), sizes,
                                         strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("linear_few_rows: no tensor map for " + std::to_string(p.N) + " rows of weights, " +
                             std::to_string(p.weight_stride) + " bytes apart");
  return map;
}

template <typename T, WeightFormat kFormat, int kEights, bool kZeros>
void launch_kernel(const LinearFewRowsParams& p, int of_cluster, cudaStream_t stream) {
  constexpr auto kKernel = linear_few_rows_kernel<T, kFormat, kEights, kZeros>;
  const Device& device = current_device();
  const int of_step = features_of_step<kFormat>(), row_bytes = bytes_of_row<kFormat>(p.K);
  const int features = features_of(p.K, of_step, of_cluster);
  const int of_ring = stages(p.M, features, of_cluster, device.max_shared_bytes);
  LaunchShape shape{.grid = dim3(of_cluster),
                    .threads = dim3(kThreads),
                    .shared_bytes = static_cast<size_t>(shared_bytes(p.M, features, of_cluster, of_ring)),
                    .cluster = dim3(of_cluster),
                    .dependent = true};
  const int clusters = of_cluster == 1 ? device.num_sms : max_resident_clusters<kKernel>(shape);
  Plan shared_by = plan(ceil_div(p.N, kTileRows), p.K, of_step, of_cluster, of_ring, clusters);
  shape.grid = dim3(shared_by.blocks);
  if constexpr (kFormat != WeightFormat::kLikeX) {
    shared_by.groups = ceil_div(p.K, p.group);
    shared_by.per_group = ceil_div(1 << kDivide, ceil_div(p.group, Weights<kFormat>::kPieces * cuda::kFeatures));
  }
#ifdef FEW_ROWS_TUNE
  if (const char* v = getenv("FEW_SPLIT")) shared_by.split = atoi(v);
  if (const char* v = getenv("FEW_STAGES")) shared_by.stages = atoi(v);
  while (shared_by.split > shared_by.steps) shared_by.split /= 2;
  shared_by.teams = shared_by.blocks / of_cluster * (kWarps / shared_by.split);
  shared_by.rounds = ceil_div(ceil_div(p.N, kTileRows), shared_by.teams);
  while (shared_bytes(p.M, features, of_cluster, shared_by.stages) > device.max_shared_bytes) shared_by.stages--;
  shape.shared_bytes = shared_bytes(p.M, features, of_cluster, shared_by.stages);
#endif
  launch<kKernel>(shape, stream, p, weight_map(p, row_bytes), shared_by);
}

template <typename T, WeightFormat kFormat, bool kZeros>
void launch_zeros(const LinearFewRowsParams& p, int parts, cudaStream_t stream) {
  if (parts > 1 && p.M > 32) return launch_kernel<T, kFormat, 8, kZeros>(p, parts, stream);
  if (parts > 1) return launch_kernel<T, kFormat, 4, kZeros>(p, parts, stream);
  if (p.M > 8) return launch_kernel<T, kFormat, 2, kZeros>(p, parts, stream);
  launch_kernel<T, kFormat, 1, kZeros>(p, parts, stream);
}

template <typename T, WeightFormat kFormat>
void launch_rows(const LinearFewRowsParams& p, cudaStream_t stream) {
  const int of_cluster = parts(p.M, p.K, features_of_step<kFormat>(), current_device().max_shared_bytes);
  if constexpr (kFormat == WeightFormat::kInt8 || kFormat == WeightFormat::kInt4)
    if (p.zeros) return launch_zeros<T, kFormat, true>(p, of_cluster, stream);
  launch_zeros<T, kFormat, false>(p, of_cluster, stream);
}

// Some rows of x, from `first` on.
inline LinearFewRowsParams rows_of(LinearFewRowsParams p, int first, int rows) {
  p.x = static_cast<const char*>(p.x) + first * p.x_stride * size_of(p.dtype);
  p.y = static_cast<char*>(p.y) + static_cast<int64_t>(first) * p.N * size_of(p.dtype);
  p.M = rows;
  return p;
}

template <WeightFormat kFormat>
void launch_format(const LinearFewRowsParams& p, cudaStream_t stream) {
  const auto of_dtype = [&]<typename T>(T) {
    const int of_step = features_of_step<kFormat>();
    for (int first = 0, rows; first < p.M; first += rows) {
      rows = rows_at_once(p.M - first, p.K, of_step, current_device().max_shared_bytes);
      if (rows == 0) throw std::invalid_argument("linear_few_rows: a row of x does not fit into shared memory");
      launch_rows<T, kFormat>(rows_of(p, first, rows), stream);
    }
  };
  if (p.dtype == Dtype::BF16) return of_dtype(__nv_bfloat16());
  if (p.dtype == Dtype::F16) return of_dtype(__half());
  throw std::invalid_argument("linear_few_rows takes float16 and bfloat16");
}

extern template void launch_format<WeightFormat::kInt8>(const LinearFewRowsParams&, cudaStream_t);
extern template void launch_format<WeightFormat::kInt4>(const LinearFewRowsParams&, cudaStream_t);
extern template void launch_format<WeightFormat::kFp8>(const LinearFewRowsParams&, cudaStream_t);

}  // namespace cs336::few_rows
