// The norms' gradients for rows that are not whole aligned vectors: every element is read again where it is needed.
#include <limits>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "kernels/norm_bwd.h"
#include "kernels/norm_rows.cuh"

namespace cs336::cuda {
namespace {

// dx, one block a row, the row read again for each sum.
template <typename T>
__global__ void __launch_bounds__(kMaxBwdThreads) norm_bwd_any_kernel(const NormBwdParams p) {
  using Sum = RowSum<Span::kBlock, 2, kMaxBwdThreads>;
  __shared__ typename Sum::Shared sum_memory;
  Sum row_sum(sum_memory, blockDim.x, 1);
  const bool is_float = p.w_dtype == Dtype::F32;
  const float inverse_N = 1.f / static_cast<float>(p.N);
  allow_successor();
  wait_for_predecessor();
  for (int64_t row = blockIdx.x; row < p.M; row += gridDim.x) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* dsum = p.dsum ? static_cast<const T*>(p.dsum) + row * p.dsum_stride : nullptr;
    T* dx = static_cast<T*>(p.dx) + row * p.N;
    const float rstd = p.rstd[row], mean = p.centred ? p.mean[row] : 0.f;
    float sums[2] = {};
    for (int64_t i = threadIdx.x; i < p.N; i += blockDim.x) {
      const float g = to_float(dy[i]) * rstd * feature<T>(p.w, is_float, i);
      sums[0] += g * (to_float(x[i]) - mean);
      sums[1] += g;
    }
    row_sum(sums);
    const float slope = sums[0] * inverse_N * rstd * rstd, offset = p.centred ? sums[1] * inverse_N : 0.f;
    for (int64_t i = threadIdx.x; i < p.N; i += blockDim.x) {
      const float g = to_float(dy[i]) * rstd * feature<T>(p.w, is_float, i);
      const float value = g - offset - (to_float(x[i]) - mean) * slope;
      dx[i] = from_float<T>(dsum ? value + to_float(dsum[i]) : value);
    }
  }
}

// One row of partials of dw and db for each blockIdx.y: 32 columns a block, 8 rows at a time.
template <typename T>
__global__ void __launch_bounds__(256) norm_bwd_any_partials_kernel(const NormBwdParams p) {
  __shared__ float parts[2][8][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = blockIdx.x * int64_t{32} + lane, pitch = row_pitch(p.N);
  allow_successor();
  wait_for_predecessor();
  float dw = 0.f, db = 0.f;
  for (int64_t row = blockIdx.y * 8 + warp; column < p.N && row < p.M; row += gridDim.y * 8) {
    const float dy = to_float(static_cast<const T*>(p.dy)[row * p.dy_stride + column]);
    const float x = to_float(static_cast<const T*>(p.x)[row * p.x_stride + column]);
    dw += dy * p.rstd[row] * (x - (p.centred ? p.mean[row] : 0.f));
    db += dy;
  }
  parts[0][warp][lane] = dw;
  parts[1][warp][lane] = db;
  __syncthreads();
  if (warp < (p.centred ? 2 : 1) && column < p.N) {  // one warp for dw, one for db
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += parts[warp][i][lane];
    p.partials[(warp * gridDim.y + blockIdx.y) * pitch + column] = sum;
  }
}

}  // namespace

void norm_bwd_any(const NormBwdParams& p, int num_partials, cudaStream_t stream) {
  const unsigned threads = std::min<int64_t>(divide_up(p.N, 4 * 32) * 32, kMaxBwdThreads);
  const unsigned blocks = std::min<int64_t>(p.M, std::numeric_limits<int>::max());
  const LaunchShape dx{.grid = blocks, .threads = threads, .dependent = true};
  const LaunchShape partials{.grid = dim3(divide_up(p.N, 32), num_partials), .threads = 256, .dependent = true};
  dispatch_dtype(p.dtype, [&]<typename T>(T) {
    launch<norm_bwd_any_kernel<T>>(dx, stream, p);
    launch<norm_bwd_any_partials_kernel<T>>(partials, stream, p);
  });
}

}  // namespace cs336::cuda
