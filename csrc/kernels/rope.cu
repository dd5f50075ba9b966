// y = x turned by its position: pair i of a head's features, (i, i + P) or (2i, 2i + 1), by the angle whose cosine and
// sine are in the tables. A thread has the same pairs of kHeads heads at one position: the tables, twice as wide as x
// in bf16, are read once for all of them, and 8 loads are in flight.
#include <algorithm>
#include <stdexcept>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/nvtx.h"
#include "common/vec.cuh"
#include "kernels/rope.h"

namespace cs336::cuda {
namespace {

constexpr int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

constexpr int kHeads = 4;
constexpr int kThreads = 256;                 // of a block, or those of one position if they are more
constexpr int kMaxThreads = kMaxRopeDim / 2;  // two features a thread at least

// kWidth features as they lie in memory.
template <typename T, int kWidth>
using Part = std::conditional_t<kWidth == 1, T, uint4>;

template <typename T, int kWidth>
__device__ __forceinline__ void widen(const Part<T, kWidth>& part, float (&out)[kWidth]) {
  if constexpr (kWidth == 1)
    out[0] = to_float(part);
  else
    unpack<T>(part, out);
}

template <typename T, int kWidth>
__device__ __forceinline__ Part<T, kWidth> narrow(const float (&in)[kWidth]) {
  if constexpr (kWidth == 1)
    return from_float<T>(in[0]);
  else
    return pack<T>(in);
}

// In one instruction: nvcc makes four of what it has moved behind a branch, half of a training step's rope at D 64.
template <typename T, int kWidth>
__device__ __forceinline__ void put(T* out, const Part<T, kWidth>& part) {
  if constexpr (kWidth == 1)
    *out = part;
  else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(out)), "r"(part.x),
                 "r"(part.y), "r"(part.z), "r"(part.w)
                 : "memory");
}

// Two parts of a head: a thread's share. Pairs lie in the same place of both, or side by side in one.
template <int kWidth>
struct Columns {
  int first, second;
  bool turns, has_second;

  __device__ Columns(const RopeParams& p, int slot) {
    const int turning = p.P / kWidth;
    turns = slot < turning;
    first = !turns ? 2 * p.P + 2 * (slot - turning) * kWidth : p.interleaved ? 2 * slot * kWidth : slot * kWidth;
    second = turns && !p.interleaved ? first + p.P : first + kWidth;
    has_second = second < p.D;
  }
};

// The row of the tables at a position, or -1 where they have none.
__device__ __forceinline__ int64_t table_offset(const RopeParams& p, int b, int s) {
  if (!p.positions) return b * p.table_b + s * p.table_s;
  const int64_t i = b * p.position_b + s * p.position_s;
  const int64_t row =
      p.wide_positions ? static_cast<const int64_t*>(p.positions)[i] : static_cast<const int32_t*>(p.positions)[i];
  return row >= 0 && row < p.L ? row * p.table_s : -1;
}

template <int kWidth>
__device__ __forceinline__ void load_table(float (&out)[kWidth], const float* table, int64_t offset) {
#pragma unroll
  for (int i = 0; i < kWidth; i += 4) {
    if (offset < 0) {
#pragma unroll
      for (int j = i; j < i + 4 && j < kWidth; j++) out[j] = __int_as_float(0x7fffffff);  // NaN
    } else if constexpr (kWidth == 1) {
      out[0] = table[offset];
    } else {
      float four[4];
      unpack<float>(load<float>(table, offset + i), four);
#pragma unroll
      for (int j = 0; j < 4; j++) out[i + j] = four[j];
    }
  }
}

template <bool kInterleaved, int kWidth>
__device__ __forceinline__ void turn(float (&x)[2][kWidth], const float (&cos)[kWidth], const float (&sin)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; i++) {
    float& first = kInterleaved ? x[2 * i / kWidth][2 * i % kWidth] : x[0][i];
    float& second = kInterleaved ? x[(2 * i + 1) / kWidth][(2 * i + 1) % kWidth] : x[1][i];
    const float x1 = first, x2 = second;
    first = x1 * cos[i] - x2 * sin[i];
    second = x2 * cos[i] + x1 * sin[i];
  }
}

// Threads (slot, position of the block); blocks (groups of heads: q's, then k's) by positions: those at work at a time
// read the heads of a position that lie side by side.
template <typename T, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kMaxThreads) rope_kernel(const __grid_constant__ RopeParams p) {
  using Raw = Part<T, kWidth>;
  const int groups_of_q = divide_up(p.heads[0].H, kHeads);
  const unsigned groups = groups_of_q + divide_up(p.heads[1].H, kHeads);
  const unsigned row = blockIdx.x / groups * blockDim.y + threadIdx.y, length = p.S;
  const int b = static_cast<int>(row / length), s = static_cast<int>(row % length);
  const int group = static_cast<int>(blockIdx.x % groups);
  const RopeHeads& heads = p.heads[group < groups_of_q ? 0 : 1];
  const int h = (group < groups_of_q ? group : group - groups_of_q) * kHeads, num_heads = min(kHeads, heads.H - h);
  const Columns<kWidth> columns(p, static_cast<int>(threadIdx.x));
  allow_successor();
  wait_for_predecessor();
  if (b >= p.B) return;

  const T* x = static_cast<const T*>(heads.x) + b * heads.x_b + h * heads.x_h + s * heads.x_s;
  T* y = static_cast<T*>(heads.y) + b * heads.y_b + h * heads.y_h + s * heads.y_s;
  Raw parts[kHeads][2];
#pragma unroll
  for (int i = 0; i < kHeads; i++) {
    if (i >= num_heads) continue;
    parts[i][0] = *reinterpret_cast<const Raw*>(x + i * heads.x_h + columns.first);
    if (columns.has_second) parts[i][1] = *reinterpret_cast<const Raw*>(x + i * heads.x_h + columns.second);
  }
  if (columns.turns) {
    float cos[kWidth], sin[kWidth];
    const int64_t offset = table_offset(p, b, s), pair = threadIdx.x * kWidth;
    load_table(cos, p.cos, offset < 0 ? offset : offset + pair);
    load_table(sin, p.sin, offset < 0 ? offset : offset + pair);
#pragma unroll
    for (int i = 0; i < kWidth; i++) sin[i] = p.inverse ? -sin[i] : sin[i];
#pragma unroll
    for (int i = 0; i < kHeads; i++) {
      if (i >= num_heads) continue;
      float values[2][kWidth];
      widen<T, kWidth>(parts[i][0], values[0]);
      widen<T, kWidth>(parts[i][1], values[1]);
      turn<kInterleaved>(values, cos, sin);
      parts[i][0] = narrow<T, kWidth>(values[0]);
      parts[i][1] = narrow<T, kWidth>(values[1]);
    }
  }
#pragma unroll
  for (int i = 0; i < kHeads; i++) {
    if (i >= num_heads) continue;
    put<T, kWidth>(y + i * heads.y_h + columns.first, parts[i][0]);
    if (columns.has_second) put<T, kWidth>(y + i * heads.y_h + columns.second, parts[i][1]);
  }
}

// ---- launchers ----

bool has_vectors(const RopeParams& p, int width) {
  const auto fits = [&](const RopeHeads& heads) {
    const int64_t all = (p.B > 1 ? heads.x_b | heads.y_b : 0) | (heads.H > 1 ? heads.x_h | heads.y_h : 0) |
                        (p.S > 1 ? heads.x_s | heads.y_s : 0);
    return heads.H == 0 || (all % width == 0 && all_aligned(0, 1, {}, {heads.x, heads.y}));
  };
  return p.P % width == 0 && p.D % width == 0 && (p.table_b | p.table_s) % 4 == 0 &&
         all_aligned(0, 1, {}, {p.cos, p.sin}) && fits(p.heads[0]) && fits(p.heads[1]);
}

template <typename T, int kWidth>
void launch_rope(const RopeParams& p, cudaStream_t stream) {
  const int slots = p.P / kWidth + divide_up(p.D - 2 * p.P, 2 * kWidth), positions = std::max(1, kThreads / slots);
  const int groups = divide_up(p.heads[0].H, kHeads) + divide_up(p.heads[1].H, kHeads);
  const int64_t blocks = (static_cast<int64_t>(p.B) * p.S + positions - 1) / positions * groups;
  if (blocks > 0x7fffffff) throw std::invalid_argument("rope: x must be smaller");
  const LaunchShape shape{
      .grid = dim3(static_cast<unsigned>(blocks)), .threads = dim3(slots, positions), .dependent = true};
  dispatch_bool(p.interleaved,
                [&](auto interleaved) { launch<rope_kernel<T, kWidth, interleaved.value>>(shape, stream, p); });
}

}  // namespace

void rope(const RopeParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.B == 0 || p.S == 0 || p.heads[0].H + p.heads[1].H == 0) return;
  dispatch_dtype(p.dtype, [&]<typename T>(T) {
    has_vectors(p, kVec<T>) ? launch_rope<T, kVec<T>>(p, stream) : launch_rope<T, 1>(p, stream);
  });
}

}  // namespace cs336::cuda
