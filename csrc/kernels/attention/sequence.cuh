// Where the rows of a sequence are: lengths, coordinates in tensor maps, and the tensor maps themselves.
//
// A batch of equal sequences is a dimension of the map. Packed sequences lie behind each other, and the copy engine
// must neither read nor write past the end of one. It checks coordinates alone, so the map of a packed tensor claims
// kFar tokens: row r of a sequence of n tokens is token kFar - n + r, whose rows past the end are outside the map, and
// two more dimensions with strides of one token and of 2^34 bytes less one token take the address back: 2^30 steps of
// 2^34 bytes are a whole turn of the 64-bit address.
#pragma once
#include "common/check.h"
#include "common/hopper.cuh"
#include "common/tensor_map.h"
#include "kernels/attention/attention.h"

namespace cs336::attention {

inline constexpr int kFar = 1 << 30;
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr int kUnbounded = 1 << 29;  // a window this wide has no end; tokens are fewer

// Rows of one sequence in a tensor map: row r of head h is at coordinates (column, r + shift, h, c3, c4).
struct Rows {
  int shift, c3, c4;
};

struct Sequence {
  int index;
  int q_length, k_length;
  int q_start, k_start;  // in a packed tensor; 0 in a batch

  __device__ __forceinline__ int offset() const { return k_length - q_length; }  // of the key beside query 0
};

struct Sequences {
  int q_tokens, k_tokens;
  const int *cu_q, *cu_k;  // null: a batch

  // Starts that decrease or overrun cut the sequence short instead of reaching outside the tensors.
  __device__ __forceinline__ Sequence operator[](int index) const {
    if (!cu_q) return {index, q_tokens, k_tokens, 0, 0};
    const int q_start = min(max(cu_q[index], 0), q_tokens), q_end = min(max(cu_q[index + 1], q_start), q_tokens);
    const int k_start = min(max(cu_k[index], 0), k_tokens), k_end = min(max(cu_k[index + 1], k_start), k_tokens);
    return {index, q_end - q_start, k_end - k_start, q_start, k_start};
  }

  __device__ __forceinline__ Rows q_rows(const Sequence& s) const { return rows(s.index, s.q_start, s.q_length); }
  __device__ __forceinline__ Rows k_rows(const Sequence& s) const { return rows(s.index, s.k_start, s.k_length); }

  // Where the float of query 0 is in a tensor like lse, of which `heads` heads make a batch entry.
  __device__ __forceinline__ int64_t row_floats(const Sequence& s, int head, int heads) const {
    return (int64_t(cu_q ? 0 : s.index) * heads + head) * q_tokens + s.q_start;
  }

 private:
  __device__ __forceinline__ Rows rows(int index, int start, int length) const {
    return cu_q ? Rows{kFar - length, start + length, kFar} : Rows{0, index, 0};
  }
};

// A tile of 64 columns is a panel: rows of 128 bytes, the width of the swizzle. One copy moves one panel.
inline constexpr int kPanel = 64;
constexpr int num_panels(int columns) { return (columns + kPanel - 1) / kPanel; }

// The map of a tensor for copies of kPanel columns and `box_rows` rows. Columns past `columns` read as zero.
inline CUtensorMap tensor_map(const AttentionTensor& t, const AttentionProblem& p, int tokens, int heads, int columns,
                              int box_rows) {
  const auto bytes = [](int64_t stride, int64_t size) { return size > 1 ? uint64_t(stride) * 2 : 16; };
  const bool packed = p.cu_q != nullptr;
  const uint64_t token = bytes(t.token_stride, tokens);
  const uint64_t sizes[5] = {uint64_t(columns), uint64_t(packed ? kFar : tokens), uint64_t(heads),
                             packed ? uint64_t(kFar) * 2 - 1 : uint64_t(p.sequences),
                             packed ? uint64_t(kFar) * 2 - 1 : 1};
  const uint64_t strides[4] = {token, bytes(t.head_stride, heads), packed ? token : bytes(t.batch_stride, p.sequences),
                               packed ? (uint64_t(1) << 34) - token : 16};
  const uint32_t box[5] = {kPanel, uint32_t(box_rows), 1, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode_tiled()(&map, p.dtype == Dtype::BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                     5, t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("attention: no tensor map for strides of " + std::to_string(t.batch_stride) + ", " +
                             std::to_string(t.token_stride) + ", " + std::to_string(t.head_stride) + " elements");
  return map;
}

}  // namespace cs336::attention
