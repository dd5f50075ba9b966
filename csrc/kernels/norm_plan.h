// How the rows of the norms lie over threads, blocks and clusters: pure functions of shape and device. Host only and
// without CUDA, so that tests/ops/norm_plan.cpp can ask about every shape.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>

#include "common/device.h"

namespace cs336::cuda {

struct NormShape {
  int64_t M, N;
  int element_size;  // of the rows, in bytes
  bool centred;      // LayerNorm
  bool added;        // a residual in the forward, the sum's gradient in the backward
};

// A row's 16-byte vectors are dealt to its threads in turn.
struct RowLayout {
  int vecs = 0;        // 16-byte vectors per thread; 0: the rows cannot be walked in vectors
  int lanes = 1;       // threads per row in one block: a power of two up to 32, or a multiple of 32
  int log2_lanes = 0;  // of a power of two
  int threads = 1;     // per block, a multiple of lanes; equal if cluster > 1
  int cluster = 1;     // blocks per row
  int blocks = 1;

  constexpr int rows_per_block() const { return threads / lanes; }
  constexpr void set_lanes(int count) {
    lanes = count;
    log2_lanes = std::countr_zero(static_cast<unsigned>(count));
  }
};

constexpr int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int64_t row_pitch(int64_t N) { return (N + 3) / 4 * 4; }  // of partial sums: rows start at 16 bytes

// Whether rows of this length can be walked in 16-byte vectors, wherever they start. M is limited so that the number of
// a row, and a few grids more, is an int.
constexpr bool has_vectors(const NormShape& s) {
  return s.N * s.element_size % 16 == 0 && s.M < (int64_t{1} << 30) && s.N < (int64_t{1} << 30);
}

// ---- forward ----

inline constexpr int kMaxFwdThreads = 1024;

// Enough blocks must be resident: their loads in flight, 32 to 128 KB a multiprocessor, are what keeps memory busy.
constexpr int max_fwd_registers(int vecs, bool residual, bool centred, bool hold) {
  if (centred) return vecs == 1 ? (hold ? 40 : 32) : vecs == 2 ? (hold ? 64 : 48) : hold ? 96 : 64;
  if (residual) return vecs == 1 ? (hold ? 40 : 32) : vecs == 2 ? (hold ? 48 : 40) : hold ? 72 : 56;
  return vecs == 1 ? 32 : vecs == 2 ? 40 : vecs == 4 ? (hold ? 56 : 48) : hold ? 96 : 64;
}

// Vectors a thread, by the 16-byte vectors of a row. It depends on the rows' length alone, never on their number: the
// order of the sums, and so a row's bits, must not. Many vectors keep much in flight, few are soon summed. H200, bf16,
// us for x of 64 MB / 1 MB (row_vecs is N / 8):
//   N                  512         1024        2048        4096        8192        16384       32768
//   RMSNorm    1       80  / 1.6   40.5 / 1.6  38.0 / 1.7  45   / 2.5
//              2       33.9 / 1.6  40.2 / 1.7  32.7 / 1.8  33.6 / 2.5  34.1 / 2.7  37.6 / 2.8  40.0 / 3.2
//              4       33.8 / 2.3  33.4 / 2.3  34.0 / 2.1  34.4 / 2.8  34.5 / 2.8  34.3 / 2.7  36.1 / 2.9
//   residual   1       80  / 2.2   64.2 / 2.0  64.5 / 2.1  66.2 / 2.5  67.4 / 2.6
//              2       65.5 / 2.1  65.0 / 2.4  64.7 / 2.4  65.9 / 3.0  65.0 / 2.7  65.6 / 3.0  68.3 / 3.4
//   LayerNorm  2       35.2 / 2.2  41.4 / 2.2  38.7 / 2.2  40.8 / 2.8  43.7 / 2.9  51   / 3.1  58   / 3.7
//              4       36.4 / 2.7  36.5 / 2.8  37.6 / 3.0  37.9 / 3.1  39.5 / 2.8  43.0 / 3.0  50.1 / 3.3
constexpr int fwd_vecs_per_thread(int64_t row_vecs, bool residual, bool centred) {
  if (residual && centred) return row_vecs <= 32 ? 1 : row_vecs <= 2048 ? 2 : 4;
  if (residual) return row_vecs <= 32 ? 1 : row_vecs <= 64 ? 2 : row_vecs <= 512 ? 1 : row_vecs <= 2048 ? 2 : 4;
  if (centred) return row_vecs <= 8 ? 1 : row_vecs <= 64 ? 2 : 4;
  return row_vecs <= 8 ? 1 : row_vecs <= 64 ? 2 : row_vecs <= 128 ? 4 : row_vecs <= 1024 ? 2 : row_vecs <= 8192 ? 4 : 8;
}

// The kernels that are compiled: what fwd_vecs_per_thread asks for, on lanes or on blocks.
constexpr bool has_fwd_kernel(int vecs, Span span, bool residual, bool centred) {
  const bool lanes = span == Span::kLanes;
  switch (vecs) {
    case 1:
      return lanes || (residual && !centred);
    case 2:
      return lanes || residual || !centred;
    case 4:
      return !lanes || !residual;
    case 8:
      return !lanes && !residual && !centred;
    default:
      return false;
  }
}

struct FwdPlan {
  RowLayout layout;  // without vectors: one block a row, one element a thread
  Span span = Span::kBlock;
  bool hold = false;  // w and b stay in registers
};

constexpr RowLayout fwd_layout(const NormShape& s, const Device& device) {
  RowLayout layout;
  if (!has_vectors(s)) return layout;
  const int64_t row_vecs = s.N * s.element_size / 16;
  layout.vecs = fwd_vecs_per_thread(row_vecs, s.added, s.centred);
  const int threads = divide_up(row_vecs, layout.vecs);
  if (threads <= 32) {
    layout.set_lanes(std::bit_ceil(static_cast<unsigned>(threads)));
    layout.threads = layout.vecs == 4 ? 64 : 128;
  } else {
    while (device.has_clusters && layout.cluster < kMaxCluster && divide_up(threads, layout.cluster) > 512)
      layout.cluster *= 2;
    layout.set_lanes(divide_up(threads, layout.cluster * 32) * 32);
    layout.threads = layout.lanes;
    if (layout.threads > kMaxFwdThreads) return {};
  }
  layout.blocks = divide_up(s.M, layout.rows_per_block()) * layout.cluster;
  return layout;
}

// Whether w and b are worth their registers, which other rows' loads in flight could have: always if all rows are in
// flight at once (N = 16384, 1 MB, H200: 2.7 instead of 3.7 us), else up to some length (8192, 64 MB: 35.8 instead of
// 34.1 us, 4096: 33.6 instead of 33.8).
constexpr bool holds_features(const NormShape& s, const RowLayout& layout, const Device& device) {
  const int64_t row_vecs = s.N * s.element_size / 16;
  const int registers = max_fwd_registers(layout.vecs, s.added, s.centred, true);
  if (layout.threads * registers > device.registers) return false;
  if (layout.blocks <= device.num_sms * (device.registers / (layout.threads * registers))) return true;
  if (s.centred) return s.added && row_vecs <= 2048;
  return row_vecs <= (s.added ? 4096 : 512);
}

// aligned: all rows and features start at multiples of 16 bytes. It decides how elements are loaded, not by whom: one
// row and many, wherever they lie, are summed in one order. one_dtype: the features have that of the rows.
constexpr FwdPlan plan_fwd(const NormShape& s, bool aligned, bool one_dtype, const Device& device) {
  FwdPlan plan{.layout = fwd_layout(s, device)};
  if (plan.layout.vecs == 0) return plan;
  plan.span = plan.layout.lanes <= 32 ? Span::kLanes : Span::kBlock;
  plan.hold = aligned && one_dtype && holds_features(s, plan.layout, device);
  return plan;
}

// ---- backward ----

inline constexpr int kMaxBwdThreads = 512;

// Of the ring: 64 KB in flight at 512 threads keep a multiprocessor's memory busy. More only lengthens the queues, and
// the multiprocessors' shares become unequal (three stages: 54.5 instead of 52.3 us for rows of 512, 64 MB, H200).
// Where the warps of a block do not wait for each other even half of that is enough, and worth it once the rest of a
// launch is small beside it (rows of 512, 256 MB: 198 instead of 210 us; 64 MB: 54.5 instead of 52.3).
constexpr int num_stages(int vecs) { return vecs <= 4 ? 2 : 1; }
inline constexpr int64_t kOneStageBytes = int64_t{128} << 20;  // of x

constexpr int ring_bytes_per_thread(int vecs, int stages, int num_streams) {
  return stages * (num_streams * vecs * 16 + 2 * static_cast<int>(sizeof(float)));
}

struct BwdPlan {
  RowLayout layout;  // without vectors: the kernels for any layout
  Span span = Span::kBlock;
  int stages = 1;
  int num_partials = 0;  // rows of partial sums of dw, at most
};

// 16 elements a thread, so that dw, w and g fit registers (32 only where a cluster would not hold the row otherwise),
// and 512 threads a multiprocessor: few partials. LayerNorm's are two blocks of 256, since it waits longer between
// barriers (N = 4096, 256 MB, H200: 230 instead of 245 us). Smaller blocks where there are too few rows to go round.
constexpr RowLayout bwd_layout(const NormShape& s, const Device& device) {
  RowLayout layout;
  const int max_cluster = device.has_clusters ? kMaxCluster : 1, num_streams = s.added ? 3 : 2;
  int threads = 0, max_threads = 0;
  for (int elements : {16, 32}) {
    layout.vecs = elements * s.element_size / 16;
    threads = divide_up(s.N, elements);
    max_threads = (device.max_shared_bytes - 4096) /
                  ring_bytes_per_thread(layout.vecs, num_stages(layout.vecs), num_streams) / 32 * 32;
    max_threads = std::min(max_threads, kMaxBwdThreads);
    if (threads <= max_threads * max_cluster) break;
  }
  const int block = s.centred && threads <= 256 * max_cluster ? std::min(256, max_threads) : max_threads;
  while (divide_up(threads, layout.cluster) > block) layout.cluster *= 2;
  if (layout.cluster > max_cluster) return {};
  layout.set_lanes(threads <= 32 ? static_cast<int>(std::bit_ceil(static_cast<unsigned>(threads)))
                                 : divide_up(threads, layout.cluster * 32) * 32);
  const int unit = std::max(layout.lanes, 32);  // threads that only come together
  const int64_t units = layout.cluster > 1 ? 1 : divide_up(s.M * layout.lanes / unit, device.num_sms);
  layout.threads = unit * static_cast<int>(std::clamp<int64_t>(units, 1, block / unit));
  const int resident = std::max(1, device.num_sms * (max_threads / layout.threads) / layout.cluster);
  const int groups = divide_up(s.M, layout.rows_per_block());
  layout.blocks = divide_up(groups, std::max(1, divide_up(groups, resident))) * layout.cluster;  // even shares
  return layout;
}

constexpr BwdPlan plan_bwd(const NormShape& s, bool aligned, const Device& device) {
  BwdPlan plan;
  if (aligned && has_vectors(s)) plan.layout = bwd_layout(s, device);
  if (plan.layout.vecs == 0) {  // one for every 32 rows, unless that is more than fills the device
    plan.num_partials = std::min(divide_up(s.M, 32), divide_up(32 * device.num_sms, divide_up(s.N, 32)));
    return plan;
  }
  const bool lanes = plan.layout.lanes <= 32, long_row = plan.layout.vecs > s.element_size;
  plan.span = lanes ? Span::kLanes : !long_row && plan.layout.rows_per_block() > 1 ? Span::kWarps : Span::kBlock;
  plan.stages = lanes && s.M * s.N * s.element_size >= kOneStageBytes ? 1 : num_stages(plan.layout.vecs);
  plan.num_partials = plan.layout.blocks / plan.layout.cluster;
  return plan;
}

// Floats of the partial sums of dw, and of db behind them.
constexpr int64_t bwd_workspace(const NormShape& s, const BwdPlan& plan) {
  return plan.num_partials * row_pitch(s.N) * (s.centred ? 2 : 1);
}

}  // namespace cs336::cuda
