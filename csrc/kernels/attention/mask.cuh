// Which keys a query sees, for blocks and for elements.
#pragma once
#include "kernels/attention/sequence.cuh"

namespace cs336::attention {

// What the scores of a launch need: nothing but the end of the keys, an end on the right too, or on both sides.
enum class Mask { kNone, kRight, kWindow };

struct Window {
  int left, right;  // keys before and after the one beside the query; kUnbounded: all

  explicit Window(const AttentionProblem& p)
      : left(p.window_left < 0 ? kUnbounded : min_of(p.window_left)),
        right(p.window_right < 0 ? kUnbounded : min_of(p.window_right)) {}

  // One past the last key and the first key of query `row`; the first may lie behind the end.
  template <Mask kMask>
  __device__ __forceinline__ int end(const Sequence& s, int row) const {
    return kMask == Mask::kNone ? s.k_length : min(s.k_length, row + s.offset() + right + 1);
  }
  template <Mask kMask>
  __device__ __forceinline__ int begin(const Sequence& s, int row) const {
    return kMask == Mask::kWindow ? max(0, row + s.offset() - left) : 0;
  }

 private:
  static int min_of(int x) { return x < kUnbounded ? x : kUnbounded; }
};

// Blocks [first, last) of keys. Never empty: where nothing is seen, one block whose elements are all masked.
struct Blocks {
  int first, last;
  __device__ __forceinline__ int count() const { return last - first; }
};

// The blocks that rows [row, row + rows) of a sequence see some key of.
template <Mask kMask, int kKeys>
__device__ __forceinline__ Blocks visible_blocks(const Window& window, const Sequence& s, int row, int rows) {
  const int last_row = max(min(row + rows, s.q_length) - 1, row);
  const int last = max(1, (window.end<kMask>(s, last_row) + kKeys - 1) / kKeys);
  return {min(window.begin<kMask>(s, row) / kKeys, last - 1), last};
}

// Sets what a query must not see to minus infinity. s holds rows `row` and row + 8 of this thread and, in pairs,
// columns from `key` on, as wgmma lays them out.
template <Mask kMask, int N>
__device__ __forceinline__ void mask_scores(float (&scores)[N], const Window& window, const Sequence& s, int row,
                                            int key) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int end = window.end<kMask>(s, row + 8 * i) - key;
    const int begin = kMask == Mask::kWindow ? window.begin<kMask>(s, row + 8 * i) - key : 0;
#pragma unroll
    for (int e = 0; e < N; e++) {
      if (e / 2 % 2 != i) continue;
      const int column = e / 4 * 8 + e % 2;
      if (column >= end || (kMask == Mask::kWindow && column < begin)) scores[e] = -INFINITY;
    }
  }
}

// The same of scores whose rows are keys, `key` and key + 8 of this thread, and whose columns are queries from `query`
// on.
template <Mask kMask, int N>
__device__ __forceinline__ void mask_transposed_scores(float (&scores)[N], const Window& window, const Sequence& s,
                                                       int key, int query) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int beside = key + 8 * r - s.offset() - query;           // column of the query beside the key
    int begin = kMask == Mask::kNone ? 0 : beside - window.right;  // columns [begin, end) see the key
    int end = kMask == Mask::kWindow ? beside + window.left + 1 : 2 * N;
    if (key + 8 * r >= s.k_length) end = begin = 2 * N;
#pragma unroll
    for (int e = 0; e < N; e++) {
      if (e / 2 % 2 != r) continue;
      const int column = e / 4 * 8 + e % 2;
      if (column < begin || (kMask == Mask::kWindow && column >= end)) scores[e] = -INFINITY;
    }
  }
}

}  // namespace cs336::attention
