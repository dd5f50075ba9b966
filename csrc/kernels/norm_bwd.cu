// With c = x - mean (RMSNorm has no mean), g = dy * rstd * w, and means over the N features of a row:
//   dx = g - mean(g) - c * rstd^2 * mean(g * c) + dsum          (RMSNorm has no mean(g))
//   dw = sum over rows of dy * rstd * c,  db = sum over rows of dy
//
// Blocks stay and loop over rows. Each thread copies its own vectors of the next rows into a ring in shared memory, so
// that loads are in flight while a row is reduced and written. A block keeps its sums for dw and db in registers,
// writes them once as one row of partials, and a second small kernel adds the partials in a fixed order: no atomics.
#include <limits>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/nvtx.h"
#include "kernels/norm.h"
#include "kernels/norm_rows.cuh"

namespace cs336::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kHeld = 16;  // elements per thread up to which w and g stay in registers

// Of the ring: 64 KB in flight at 512 threads keep a multiprocessor's memory busy. More only lengthens the queues, and
// the multiprocessors' shares become unequal (three stages: 54.5 instead of 52.3 us for rows of 512, 64 MB, H200).
// Where the warps of a block do not wait for each other even half of that is enough, and worth it once the rest of a
// launch is small beside it (rows of 512, 256 MB: 198 instead of 210 us; 64 MB: 54.5 instead of 52.3).
constexpr int num_stages(int vecs) { return vecs <= 4 ? 2 : 1; }
constexpr int64_t kOneStageBytes = int64_t{128} << 20;  // of x

constexpr int ring_bytes_per_thread(int vecs, int stages, int num_streams) {
  return stages * (num_streams * vecs * static_cast<int>(sizeof(uint4)) + 2 * static_cast<int>(sizeof(float)));
}

// ---- kernels ----

template <typename T, int kVecs, int kStages, Span kSpan, bool kCentred>
__global__ void __launch_bounds__(kMaxThreads) norm_bwd_kernel(const NormBwdParams p, const RowLayout layout) {
  constexpr int kSize = kVec<T>, kElements = kVecs * kSize;
  constexpr bool kHold = kElements <= kHeld;
  using Sum = RowSum<kSpan, kCentred ? 2 : 1, kMaxThreads>;
  extern __shared__ uint4 ring_memory[];
  __shared__ typename Sum::Shared sum_memory;
  const Place<T, kSpan> place(p.M, p.N, layout);
  const Ring<kVecs> ring{ring_memory + threadIdx.x, static_cast<int>(blockDim.x), p.dsum ? 3 : 2};
  float* stats = reinterpret_cast<float*>(ring.slot(kStages, 0, 0) - threadIdx.x) + threadIdx.x;  // rstd, mean by stage
  const int num_groups = (place.M + place.rows_per_block - 1) / place.rows_per_block;
  const bool is_float = p.w_dtype == Dtype::F32;
  const float inverse_N = 1.f / static_cast<float>(place.N);

  allow_successor();
  Sum row_sum(sum_memory, layout.lanes, layout.cluster);
#pragma unroll
  for (int stage = 0; stage < kStages; stage++) {  // hides 1 us of the 53 us that 64 MB take
    const int64_t row = place.row(place.first + stage * place.stride);
    if (row >= place.M) break;
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      if (!place.has(v)) continue;
      prefetch_L2(static_cast<const T*>(p.dy) + row * p.dy_stride + place.column(v));
      prefetch_L2(static_cast<const T*>(p.x) + row * p.x_stride + place.column(v));
    }
  }
  wait_for_predecessor();

  auto copy_rows = [&](int group, int stage) {  // zeros past the last row and column: they add nothing to any sum
    if (group < num_groups) {
      const int64_t row = place.row(group);
      const bool valid = row < place.M;
      auto copy = [&](int stream, const void* rows, int64_t stride) {
#pragma unroll
        for (int v = 0; v < kVecs; v++) {
          const bool live = valid && place.has(v);
          const T* source = static_cast<const T*>(rows) + (live ? row * stride + place.column(v) : 0);
          copy_async(ring.slot(stage, stream, v), source, live);
        }
      };
      copy(0, p.dy, p.dy_stride);
      copy(1, p.x, p.x_stride);
      if (p.dsum) copy(2, p.dsum, p.dsum_stride);
      copy_async(stats + 2 * stage * blockDim.x, p.rstd + (valid ? row : 0), valid);
      if constexpr (kCentred) copy_async(stats + (2 * stage + 1) * blockDim.x, p.mean + (valid ? row : 0), valid);
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; stage++) copy_rows(place.first + stage * place.stride, stage);

  float held_w[kHold ? kElements : 1], dw[kElements] = {}, db[kCentred ? kElements : 1] = {};
  auto load_w = [&](float (&w)[kSize], int v) {
#pragma unroll
    for (int i = 0; i < kSize; i++) w[i] = 0.f;
    if (place.has(v)) load_features<T>(w, p.w, is_float, place.column(v));
  };
  if constexpr (kHold) {
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      float w[kSize];
      load_w(w, v);
#pragma unroll
      for (int i = 0; i < kSize; i++) held_w[v * kSize + i] = w[i];
    }
  }

  int stage = 0;
  for (int group = place.first; group < num_groups; group += place.stride) {
    float held_g[kHold ? kElements : 1], sums[kCentred ? 2 : 1] = {};  // of g * c, of g
    uint4 held_x[kHold ? kVecs : 1];
    float dy[kSize], x[kSize], w[kSize];
    // g of the vector v, and its x, from the ring
    auto load_g = [&](int v) {
      if constexpr (kHold) {
#pragma unroll
        for (int i = 0; i < kSize; i++) w[i] = held_w[v * kSize + i];
      } else {
        load_w(w, v);
      }
      unpack<T>(*ring.slot(stage, 0, v), dy);
      const uint4 packed_x = *ring.slot(stage, 1, v);
      unpack<T>(packed_x, x);
      if constexpr (kHold) held_x[v] = packed_x;
    };
    wait_copies<kStages - 1>();
    const float rstd = stats[2 * stage * blockDim.x], mean = kCentred ? stats[(2 * stage + 1) * blockDim.x] : 0.f;
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      load_g(v);
#pragma unroll
      for (int i = 0; i < kSize; i++) {
        const int e = v * kSize + i;
        const float c = x[i] - mean, scaled_dy = dy[i] * rstd, g = scaled_dy * w[i];
        sums[0] += g * c;
        dw[e] += scaled_dy * c;
        if constexpr (kCentred) sums[1] += g, db[e] += dy[i];
        if constexpr (kHold) held_g[e] = g;
      }
    }
    const bool used_up = kHold && !p.dsum;  // this stage of the ring
    if (used_up) copy_rows(group + kStages * place.stride, stage);
    row_sum(sums);

    const int64_t row = place.row(group);
    const float slope = sums[0] * inverse_N * rstd * rstd;
    const float offset = kCentred ? mean * slope - sums[1] * inverse_N : 0.f;
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      if constexpr (kHold)
        unpack<T>(held_x[v], x);
      else
        load_g(v);
#pragma unroll
      for (int i = 0; i < kSize; i++) {
        const float g = kHold ? held_g[kHold ? v * kSize + i : 0] : dy[i] * rstd * w[i];
        dy[i] = (kCentred ? g + offset : g) - x[i] * slope;
      }
      if (p.dsum) {
        unpack<T>(*ring.slot(stage, 2, v), x);
#pragma unroll
        for (int i = 0; i < kSize; i++) dy[i] += x[i];
      }
      if (row < place.M && place.has(v)) store<T>(p.dx, row * p.N + place.column(v), pack<T>(dy));
    }
    if (!used_up) copy_rows(group + kStages * place.stride, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_copies<0>();

  // Add the rows of a warp, then those of the block, and write one row of partials.
  const int64_t pitch = (p.N + 3) / 4 * 4;
  auto write_partials = [&](const float (&sums)[kElements], float* partials) {
    const int num_parts = kSpan == Span::kLanes ? blockDim.x / 32 : place.rows_per_block;
    const int part = kSpan == Span::kLanes ? threadIdx.x / 32 : place.in_block;
    float* parts = reinterpret_cast<float*>(ring_memory);
    float* target = num_parts == 1 ? partials : parts + part * pitch;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kElements; e += 4) {
      float four[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        four[j] = sums[e + j];
        if constexpr (kSpan == Span::kLanes) {
#pragma unroll
          for (int offset = 16; offset > 0; offset /= 2)
            if (offset >= place.width) four[j] += __shfl_xor_sync(~0u, four[j], offset);
        }
      }
      const bool chosen = kSpan != Span::kLanes || threadIdx.x % 32 == place.mine;
      if (chosen && place.has(e / kSize)) store<float>(target, place.column(e / kSize) + e % kSize, pack<float>(four));
    }
    if (num_parts == 1) return;
    __syncthreads();
    for (int column = threadIdx.x; column < place.N; column += blockDim.x) {
      double sum = 0;
      for (int i = 0; i < num_parts; i++) sum += parts[i * pitch + column];
      partials[column] = static_cast<float>(sum);
    }
  };
  float* partials = p.partials + place.first * pitch;
  write_partials(dw, partials);
  if constexpr (kCentred) write_partials(db, partials + place.stride * pitch);
}

// Any length, stride and alignment: dx, one block a row, the row read again for each sum.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) norm_bwd_any_kernel(const NormBwdParams p) {
  using Sum = RowSum<Span::kBlock, 2, kMaxThreads>;
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
  const int64_t column = blockIdx.x * int64_t{32} + lane, pitch = (p.N + 3) / 4 * 4;
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

// out[k, n] = sum over i of partials[k, i, n] for k < gridDim.y: 32 columns a block, 8 threads of 4 columns by 32 rows.
template <typename T>
__global__ void __launch_bounds__(256)
    column_sum_kernel(const float* partials, int num_partials, int64_t N, void* dw, void* db) {
  __shared__ double parts[8][32];
  const int64_t first = blockIdx.x * int64_t{32}, pitch = (N + 3) / 4 * 4;
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

// ---- launchers ----

// 16 elements a thread, so that dw, w and g fit registers (32 only where a cluster would not hold the row otherwise),
// and 512 threads a multiprocessor: few partials. LayerNorm's are two blocks of 256, since it waits longer between
// barriers (N = 4096, 256 MB, H200: 230 instead of 245 us). Smaller blocks where there are too few rows to go round.
RowLayout plan_bwd(int64_t M, int64_t N, int elements_per_vec, int num_streams, bool centred, const Device& device) {
  RowLayout layout;
  const int max_cluster = device.has_clusters ? kMaxCluster : 1;
  int threads, max_threads;
  for (int elements : {16, 32}) {
    layout.vecs = elements / elements_per_vec;
    threads = divide_up(N, elements);
    max_threads = (device.max_shared_bytes - 4096) /
                  ring_bytes_per_thread(layout.vecs, num_stages(layout.vecs), num_streams) / 32 * 32;
    max_threads = std::min(max_threads, kMaxThreads);
    if (threads <= max_threads * max_cluster) break;
  }
  const int block = centred && threads <= 256 * max_cluster ? std::min(256, max_threads) : max_threads;
  while (divide_up(threads, layout.cluster) > block) layout.cluster *= 2;
  if (layout.cluster > max_cluster) return {};
  layout.set_lanes(threads <= 32 ? std::bit_ceil(static_cast<unsigned>(threads))
                                 : divide_up(threads, layout.cluster * 32) * 32);
  const int unit = std::max(layout.lanes, 32);  // threads that only come together
  const int64_t units = layout.cluster > 1 ? 1 : divide_up(M * layout.lanes / unit, device.num_sms);
  layout.threads = unit * static_cast<int>(std::clamp<int64_t>(units, 1, block / unit));
  const int resident = std::max(1, device.num_sms * (max_threads / layout.threads) / layout.cluster);
  const int groups = divide_up(M, layout.rows_per_block());
  layout.blocks = divide_up(groups, std::max(1, divide_up(groups, resident))) * layout.cluster;  // even shares
  return layout;
}

struct BwdPlan {
  RowLayout layout;
  int num_partials;  // at most
};

BwdPlan plan_bwd(const NormBwdParams& p) {
  const int element_size = p.dtype == Dtype::F32 ? 4 : 2;
  const Device& device = current_device();
  BwdPlan plan{};
  if (takes_vectors(p.M, p.N, element_size, {p.dy_stride, p.dsum_stride, p.x_stride}, {p.dy, p.dsum, p.x, p.w}))
    plan.layout = plan_bwd(p.M, p.N, 16 / element_size, p.dsum ? 3 : 2, p.centred, device);
  if (plan.layout.vecs > 0)
    plan.num_partials = plan.layout.blocks / plan.layout.cluster;
  else  // one for every 32 rows, unless that is more than fills the device
    plan.num_partials = std::min(divide_up(p.M, 32), divide_up(32 * device.num_sms, divide_up(p.N, 32)));
  return plan;
}

template <typename T>
void launch_column_sum(const NormBwdParams& p, int num_partials, cudaStream_t stream) {
  launch<column_sum_kernel<T>>({.grid = dim3(divide_up(p.N, 32), p.centred ? 2 : 1), .threads = 256, .dependent = true},
                               stream, static_cast<const float*>(p.partials), num_partials, p.N, p.dw, p.db);
}

// The number of partials.
template <typename T, int kVecs, int kStages, Span kSpan, bool kCentred>
int launch_bwd(const NormBwdParams& p, RowLayout layout, cudaStream_t stream) {
  constexpr auto kKernel = norm_bwd_kernel<T, kVecs, kStages, kSpan, kCentred>;
  LaunchShape shape{
      .grid = static_cast<unsigned>(layout.blocks),
      .threads = static_cast<unsigned>(layout.threads),
      .shared_bytes = static_cast<size_t>(ring_bytes_per_thread(kVecs, kStages, p.dsum ? 3 : 2)) * layout.threads,
      .cluster = static_cast<unsigned>(layout.cluster),
      .dependent = true};
  if (layout.cluster > 1) {  // fewer than its multiprocessors would hold: clusters do not cross their groups
    const int clusters = std::max(1, max_resident_clusters<kKernel>(shape)), planned = layout.blocks / layout.cluster;
    shape.grid.x = std::min(planned, divide_up(p.M, divide_up(p.M, clusters))) * layout.cluster;
  }
  launch<kKernel>(shape, stream, p, layout);
  return static_cast<int>(shape.grid.x / shape.cluster_size());
}

template <typename T, bool kCentred>
int choose_bwd(const NormBwdParams& p, const RowLayout& layout, cudaStream_t stream) {
  constexpr int kVecs = 16 / kVec<T>, kStages = num_stages(kVecs), kLongStages = num_stages(2 * kVecs);
  if (layout.lanes <= 32) {
    if (p.M * p.N * static_cast<int64_t>(sizeof(T)) >= kOneStageBytes)
      return launch_bwd<T, kVecs, 1, Span::kLanes, kCentred>(p, layout, stream);
    return launch_bwd<T, kVecs, kStages, Span::kLanes, kCentred>(p, layout, stream);
  }
  if (layout.vecs > kVecs) return launch_bwd<T, 2 * kVecs, kLongStages, Span::kBlock, kCentred>(p, layout, stream);
  if (layout.rows_per_block() > 1) return launch_bwd<T, kVecs, kStages, Span::kWarps, kCentred>(p, layout, stream);
  return launch_bwd<T, kVecs, kStages, Span::kBlock, kCentred>(p, layout, stream);
}

template <typename T>
void launch_bwd_any(const NormBwdParams& p, int num_partials, cudaStream_t stream) {
  const unsigned threads = std::min<int64_t>(divide_up(p.N, 4 * 32) * 32, kMaxThreads);
  const unsigned blocks = std::min<int64_t>(p.M, std::numeric_limits<int>::max());
  launch<norm_bwd_any_kernel<T>>({.grid = blocks, .threads = threads, .dependent = true}, stream, p);
  launch<norm_bwd_any_partials_kernel<T>>(
      {.grid = dim3(divide_up(p.N, 32), num_partials), .threads = 256, .dependent = true}, stream, p);
}

template <typename T>
void norm_bwd(const NormBwdParams& p, cudaStream_t stream) {
  auto [layout, num_partials] = plan_bwd(p);
  if (p.M > 0 && layout.vecs > 0)
    dispatch_bool(p.centred, [&](auto centred) { num_partials = choose_bwd<T, centred.value>(p, layout, stream); });
  else if (p.M > 0)
    launch_bwd_any<T>(p, num_partials, stream);
  if (p.w_dtype == Dtype::F32)
    launch_column_sum<float>(p, num_partials, stream);
  else
    launch_column_sum<T>(p, num_partials, stream);
}

}  // namespace

int64_t norm_bwd_workspace(const NormBwdParams& p) {
  return plan_bwd(p).num_partials * ((p.N + 3) / 4 * 4) * (p.centred ? 2 : 1);
}

void norm_bwd(const NormBwdParams& p, cudaStream_t stream) {
  NVTX_FN();
  dispatch_dtype(p.dtype, [&](auto t) { norm_bwd<decltype(t)>(p, stream); });
}

}  // namespace cs336::cuda
