// Tiles of rows over all sequences, and the order in which they are worked on.
#pragma once
#include "kernels/attention/attention_plan.h"
#include "kernels/attention/sequence.cuh"

namespace cs336::attention {

// A tile of one sequence; sequence -1: none, a gap between packed sequences (see attention_tiles).
struct SequenceTile {
  int sequence, row0;
};

// Tile `index` of packed sequences, by bisection: the last sequence whose first tile is not past it.
__device__ __forceinline__ SequenceTile find_packed_tile(const int* cu, int sequences, int tokens, int rows,
                                                         int index) {
  const auto first_tile = [=](int i) { return min(max(cu[i], 0), tokens) / rows + i; };
  int low = 0, high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_tile(middle) <= index ? low : high) = middle;
  }
  const int start = min(max(cu[low], 0), tokens), end = min(max(cu[low + 1], start), tokens);
  const int row0 = (index - first_tile(low)) * rows;
  return row0 >= 0 && row0 < end - start ? SequenceTile{low, row0} : SequenceTile{-1, 0};
}

// Whether starts decrease or overrun; for all threads of a block together.
__device__ __forceinline__ bool wrong_starts(const int* cu, int sequences, int tokens) {
  bool wrong = false;
  for (int i = threadIdx.x; i <= sequences; i += blockDim.x) wrong |= cu[i] < (i ? cu[i - 1] : 0) || cu[i] > tokens;
  return __syncthreads_or(wrong);
}

// Writes the packed tiles of queries or of keys behind each other, so that nobody has to search again, and zeroes the
// counter that deals them. Where starts are wrong it deals none: tiles that are cut wrongly would wait for a turn that
// never comes.
static __global__ void list_packed_tiles(const Sequences s, int sequences, bool of_keys, int rows, int count,
                                         SequenceTile* tiles, int* counter) {
  constexpr int kNone = 1 << 30;
  if (blockIdx.x == 0) {
    const bool wrong = wrong_starts(s.cu_q, sequences, s.q_tokens) || wrong_starts(s.cu_k, sequences, s.k_tokens);
    if (threadIdx.x == 0) *counter = wrong ? kNone : 0;
  }
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index < count)
    tiles[index] =
        find_packed_tile(of_keys ? s.cu_k : s.cu_q, sequences, of_keys ? s.k_tokens : s.q_tokens, rows, index);
}

// Of a packed tensor and a second one like it, or of lse beside it: what tokens that no sequence holds get.
struct Unheld {
  AttentionTensor zero, zero_too;  // zero_too.data null: none
  int heads, vectors;              // of a token; of 8 elements, of a head
  float* lse;                      // (heads, tokens), minus infinity; null: none
};

// Where starts are wrong no sequence holds anything.
static __global__ void clear_unheld(const Sequences s, int sequences, bool of_keys, const Unheld a) {
  const bool wrong = wrong_starts(s.cu_q, sequences, s.q_tokens) || wrong_starts(s.cu_k, sequences, s.k_tokens);
  const int* cu = of_keys ? s.cu_k : s.cu_q;
  const int tokens = of_keys ? s.k_tokens : s.q_tokens;
  const int begin = wrong ? tokens : cu[0], held = wrong ? 0 : cu[sequences] - begin;
  const int64_t count = int64_t(tokens - held) * a.heads * a.vectors;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = i / a.vectors, unheld = row / a.heads, token = unheld < begin ? unheld : unheld + held;
    const int64_t column = i % a.vectors * 8, head = row % a.heads;
    for (const AttentionTensor* t : {&a.zero, &a.zero_too})
      if (t->data)
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(t->data) + token * t->token_stride + head * t->head_stride +
                                  column) = {0, 0, 0, 0};
    if (a.lse && column == 0) a.lse[head * tokens + token] = -INFINITY;
  }
}

// 16 columns of a warp's 16 rows of a tile of 64 rows, as products take their left side from registers: step k of its
// columns. Four 8 x 8 matrices, the rows + 8 (e % 2) and columns + 8 (e / 2).
template <typename T>
__device__ __forceinline__ void read_left(uint32_t (&x)[4], const T* tile, int warp, int lane, int k) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int row = 16 * warp + lane / 4 + 8 * (e % 2), chunk = 2 * (k % 4) + e / 2;
    x[e] = *reinterpret_cast<const uint32_t*>(tile + k / 4 * (64 * kPanel) + row * kPanel + (chunk ^ lane / 4) * 8 +
                                              lane % 4 * 2);
  }
}

// Heads go in sections whose keys and values (queries, in the backward) fit in L2 together. Within a section all heads
// of one row tile come before the next row tile, so that the longest tiles of a section are dealt out first.
struct TileOrder {
  int row_tiles;  // of one head: of a sequence, or of all packed ones
  int heads;      // times the batch
  int section;    // heads
  const SequenceTile* packed;

  __device__ __forceinline__ int count() const { return row_tiles * heads; }

  struct Tile {
    SequenceTile rows;
    int head;
  };
  // The tile dealt out as number `index`, the last row tile of a head first.
  template <bool kLastFirst>
  __device__ __forceinline__ Tile tile(int index, int heads_of_batch, int rows) const {
    const auto [head, nth] = dealt_tile(index, row_tiles, heads, section);
    const int place = kLastFirst ? row_tiles - 1 - nth : nth;
    if (packed) return {packed[place], head};
    const int batch = head / heads_of_batch;
    return {{batch, place * rows}, head - batch * heads_of_batch};
  }
};

}  // namespace cs336::attention
