// Adds up the partial sums of dw and db, in a fixed order and in double: no atomics.
#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "kernels/norm_bwd.h"
#include "kernels/norm_rows.cuh"

namespace cs336::cuda {
namespace {

// out[k, n] = sum over i of partials[k, i, n] for k < gridDim.y: 32 columns a block, 8 threads of 4 columns by 32 rows.
template <typename T>
__global__ void __launch_bounds__(256)
    column_sum_kernel(const float* partials, int num_partials, int64_t N, void* dw, void* db) {
  __shared__ double parts[8][32];
  const int64_t first = blockIdx.x * int64_t{32}, pitch = row_pitch(N);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, mine = lane % 8 * 4;
  allow_successor();
  wait_for_predecessor();
  double sums[4] = {};
  if (first + mine < N) {
    const float* columns = partials + blockIdx.y * num_partials * pitch + first + mine;
#pragma unroll 8
    for (int i = threadIdx.x / 8; i < num_partials; i += 32) {
      float four[4];
      unpack<float>(load<float>(columns, i * pitch), four);
#pragma unroll
      for (int j = 0; j < 4; j++) sums[j] += four[j];
    }
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    sums[j] += __shfl_xor_sync(~0u, sums[j], 8);
    sums[j] += __shfl_xor_sync(~0u, sums[j], 16);
    if (lane < 8) parts[warp][mine + j] = sums[j];
  }
  __syncthreads();
  if (warp == 0 && first + lane < N) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += parts[i][lane];
    static_cast<T*>(blockIdx.y == 0 ? dw : db)[first + lane] = from_float<T>(static_cast<float>(sum));
  }
}

}  // namespace

void norm_bwd_sum_partials(const NormBwdParams& p, int num_partials, cudaStream_t stream) {
  const LaunchShape shape{.grid = dim3(divide_up(p.N, 32), p.centred ? 2 : 1), .threads = 256, .dependent = true};
  dispatch_dtype(p.w_dtype, [&]<typename T>(T) {
    launch<column_sum_kernel<T>>(shape, stream, static_cast<const float*>(p.partials), num_partials, p.N, p.dw, p.db);
  });
}

}  // namespace cs336::cuda
