// Before and after the backward's products: what they need of each query row, and dQ out of its sums.
#pragma once
#include "kernels/attention/tiles.cuh"

namespace cs336::attention {

struct RowsArgs {
  AttentionTensor o, dout, dq;
  const float *lse, *dlse;  // (batch, q heads, q tokens); dlse may be null
  Sequences sequences;
  int num_sequences, q_heads, tiles;  // query tiles of a head
  float* rows;                        // per query tile: -lse log2(e), or minus infinity for no weight; then delta
  float* sums;                        // per query tile: two pieces of dQ; null where they are not added up in memory
  int* turns;                         // per query tile and piece; null
  int* counter;
  float scale;
};

struct QueryTile {
  Sequence sequence;
  int row0, head;
  int64_t place;  // among all tiles of all heads
};

// Blocks are the tiles of the first head, of the second, ...
template <int kQueries>
__device__ __forceinline__ bool query_tile_of_block(const RowsArgs& a, QueryTile& t) {
  const int heads = blockIdx.x / a.tiles, tile = blockIdx.x - heads * a.tiles, batch = heads / a.q_heads;
  const Sequences& s = a.sequences;
  const SequenceTile at = s.cu_q ? find_packed_tile(s.cu_q, a.num_sequences, s.q_tokens, kQueries, tile)
                                 : SequenceTile{batch, tile * kQueries};
  if (at.sequence < 0) return false;
  t = {s[at.sequence], at.row0, heads - batch * a.q_heads, blockIdx.x};
  return true;
}

// The 16-byte vector of a token's row at `column`.
template <typename T>
__device__ __forceinline__ T* vector_of(const AttentionTensor& t, const Sequence& s, bool packed, int row, int head,
                                        int column) {
  const int64_t batch = packed ? 0 : s.index, token = int64_t(s.q_start) + row;
  return static_cast<T*>(t.data) + batch * t.batch_stride + token * t.token_stride + head * t.head_stride + column;
}

// delta = rowsum(O dO) - dlse, lse for exponents of two, and turns or sums of zero. kHeadDim is that of v.
template <typename T, int kHeadDim, int kQueries>
__global__ void __launch_bounds__(256) attention_bwd_prepare_kernel(const RowsArgs a) {
  constexpr int kColumns = num_panels(kHeadDim) * kPanel, kLanes = kColumns / 8, kRows = 256 / kLanes;
  if (!a.sequences.cu_q && blockIdx.x == 0 && threadIdx.x == 0) *a.counter = 0;  // packed: list_packed_tiles has
  QueryTile t;
  if (!query_tile_of_block<kQueries>(a, t)) return;
  if (a.turns) {  // whose first turn stores instead of adding
    if (threadIdx.x < 2) a.turns[2 * t.place + threadIdx.x] = 0;
  } else if (a.sums) {
    auto* sums = reinterpret_cast<float4*>(a.sums + t.place * (kQueries * kColumns));
    for (int i = threadIdx.x; i < kQueries * kColumns / 4; i += 256) sums[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  const bool packed = a.sequences.cu_q;
  const int64_t head_floats = a.sequences.row_floats(t.sequence, t.head, a.q_heads);
  float* rows = a.rows + t.place * (2 * kQueries);
#pragma unroll
  for (int i = 0; i < kQueries; i += kRows) {
    const int r = i + threadIdx.x / kLanes, row = t.row0 + r, column = threadIdx.x % kLanes * 8;
    const bool inside = row < t.sequence.q_length;
    float delta = 0.f;
    if (inside && column < kHeadDim) {
      const uint4 x = *reinterpret_cast<const uint4*>(vector_of<T>(a.o, t.sequence, packed, row, t.head, column));
      const uint4 y = *reinterpret_cast<const uint4*>(vector_of<T>(a.dout, t.sequence, packed, row, t.head, column));
      const uint32_t u[4] = {x.x, x.y, x.z, x.w}, v[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 f = hopper::unpack<T>(u[e]), g = hopper::unpack<T>(v[e]);
        delta = fmaf(f.x, g.x, delta), delta = fmaf(f.y, g.y, delta);
      }
    }
#pragma unroll
    for (int lane = 1; lane < kLanes; lane *= 2) delta += __shfl_xor_sync(~0u, delta, lane);
    if (column == 0) {
      const float lse = inside ? a.lse[head_floats + row] : -INFINITY;
      if (inside && a.dlse) delta -= a.dlse[head_floats + row];
      rows[r] = lse == -INFINITY ? -INFINITY : -kLog2E * lse;
      rows[kQueries + r] = delta;
    }
  }
}

// dQ = scale * sums, rounded. A piece of 64 rows and 64 columns holds, for thread t of a warpgroup (warp w, lane l) and
// column group j, at float4 number 128 j + t, the columns 8 j + 2 (l % 4) + {0, 1} of rows 16 w + l / 4 and 8 below.
// Here a thread takes the four float4 that make 8 columns of two rows.
template <typename T, int kHeadDim, int kQueries>
__global__ void __launch_bounds__(256) attention_bwd_finish_kernel(const RowsArgs a) {
  constexpr bool kSplitColumns = kQueries == 64;
  QueryTile t;
  if (!query_tile_of_block<kQueries>(a, t)) return;
  const int j = threadIdx.x % 8, r = threadIdx.x / 8 % 8, w = threadIdx.x / 64;
  const bool packed = a.sequences.cu_q, nothing_seen = a.turns && a.turns[2 * t.place] == 0;
#pragma unroll
  for (int piece = 0; piece < 2; piece++) {
    const int row = t.row0 + (kSplitColumns ? 0 : 64 * piece) + 16 * w + r;
    const int column = (kSplitColumns ? 64 * piece : 0) + 8 * j;
    const auto* sums = reinterpret_cast<const float4*>(a.sums + (2 * t.place + piece) * 4096);
    uint32_t top[4], bottom[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float4 x = nothing_seen ? make_float4(0.f, 0.f, 0.f, 0.f) : sums[128 * j + 32 * w + 4 * r + i];
      top[i] = hopper::pack<T>(x.x * a.scale, x.y * a.scale), bottom[i] = hopper::pack<T>(x.z * a.scale, x.w * a.scale);
    }
    const auto write = [&](int row, const uint32_t (&x)[4]) {
      if (row < t.sequence.q_length && column < kHeadDim)
        *reinterpret_cast<uint4*>(vector_of<T>(a.dq, t.sequence, packed, row, t.head, column)) = {x[0], x[1], x[2],
                                                                                                  x[3]};
    };
    write(row, top), write(row + 8, bottom);
  }
}

// dK or dV of a key head as the sum of its parts, which are neighbouring heads; eight features a thread.
struct PartsArgs {
  AttentionTensor parts, sum;
  int tokens, heads, parts_of_head;
  int64_t vectors;  // of the sum
};
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(256) attention_bwd_add_parts_kernel(const PartsArgs a) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= a.vectors) return;
  const int column = index % (kHeadDim / 8) * 8;
  const int64_t row = index / (kHeadDim / 8), token = row / a.heads % a.tokens, batch = row / a.heads / a.tokens;
  const int head = row % a.heads;
  const auto vector = [&](const AttentionTensor& t, int head) {
    T* x = static_cast<T*>(t.data) + batch * t.batch_stride + token * t.token_stride + head * t.head_stride + column;
    return reinterpret_cast<uint4*>(x);
  };
  float2 sum[4] = {};
  for (int part = 0; part < a.parts_of_head; part++) {
    const uint4 x = *vector(a.parts, head * a.parts_of_head + part);
    const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 y = hopper::unpack<T>(pairs[i]);
      sum[i].x += y.x, sum[i].y += y.y;
    }
  }
  const auto rounded = [&](int i) { return hopper::pack<T>(sum[i].x, sum[i].y); };
  *vector(a.sum, head) = {rounded(0), rounded(1), rounded(2), rounded(3)};
}

}  // namespace cs336::attention
