// Weights as a linear layer of few rows meets them: eight features of a row, from however few bits, as four pairs of
// halves, whose ten bits of mantissa take a whole number as it is. All conversions are exact.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/vec.cuh"
#include "kernels/linear_few_rows/linear_few_rows.h"

namespace cs336::few_rows {

using cuda::WeightFormat;

// One 16-bit pattern twice.
__device__ __forceinline__ constexpr uint32_t twice(uint32_t bits) { return bits | bits << 16; }

// (a & mask) | bits, in one instruction.
__device__ __forceinline__ uint32_t masked(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(mask), "r"(bits));
  return result;
}

// kBytes: of a piece, 32 features of a row; kPieces: in a chunk of 64 bytes. `take` gives eight features, the j-th of
// the 16 bytes that a lane has of a chunk, in the order that `pair` says: which two it gives i-th. A weight q is given
// as q / share + kBase + kAdd / share, its feature of x is kept times share(feature), and so x_kept * given is x q +
// kBase x_kept + kAdd x.
template <WeightFormat kFormat>
struct Weights;

// Of two or four bytes in the order in which they lie.
struct InOrder {
  static constexpr int pair(int i, int which) { return 2 * i + which; }
  static constexpr float share(int) { return 1.f; }
};

template <>
struct Weights<WeightFormat::kLikeX> : InOrder {
  static constexpr int kBytes = 64, kPieces = 1;

  __device__ __forceinline__ static void take(uint32_t (&w)[4], const uint4& v, int) {
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  }
};

template <>
struct Weights<WeightFormat::kInt8> : InOrder {
  static constexpr int kBytes = 32, kPieces = 2;
  static constexpr float kBase = 1152, kAdd = 0;  // 1024 + 128

  __device__ __forceinline__ static void take(uint32_t (&w)[4], const uint4& v, int j) {
    const uint32_t words[2] = {j ? v.z : v.x, j ? v.w : v.y};
#pragma unroll
    for (int i = 0; i < 4; i++)  // bytes below one that says 1024, where the last bit counts 1
      w[i] = __byte_perm(words[i / 2] ^ 0x80808080u, 0x64646464u, i % 2 ? 0x4342 : 0x4140);
  }
};

template <>
struct Weights<WeightFormat::kInt4> {
  static constexpr int kBytes = 16, kPieces = 4;
  static constexpr float kBase = 1024, kAdd = 8;

  // A word gives features 0 and 4, 1 and 5, 2 and 6, 3 and 7; odd ones four bits further up, as 1024 + 16 (q + 8).
  static constexpr int pair(int i, int which) { return i + 4 * which; }
  static constexpr float share(int feature) { return feature % 2 ? 0.0625f : 1.f; }

  __device__ __forceinline__ static void take(uint32_t (&w)[4], const uint4& v, int j) {
    const uint32_t word = j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = masked(i < 2 ? word : word >> 8, twice(i % 2 ? 0xf0 : 0xf), twice(0x6400));
  }
};

template <>
struct Weights<WeightFormat::kFp8> : InOrder {
  static constexpr int kBytes = 32, kPieces = 2;
  static constexpr float kBase = 0, kAdd = 0;

  __device__ __forceinline__ static void take(uint32_t (&w)[4], const uint4& v, int j) {
    const uint32_t words[2] = {j ? v.z : v.x, j ? v.w : v.y};
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = halves(words[i / 2] >> i % 2 * 16);
  }

  __device__ __forceinline__ static uint32_t halves(uint32_t two) {
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(two)));
    return pair;
  }
};

// A scale as it is kept: who asks for its value waits for it. In one register of two, for a load must wait for the one
// before that writes the same.
struct Scale {
  uint32_t word;
  uint16_t half;

  __device__ __forceinline__ float value(Dtype dtype) const {
    if (dtype == Dtype::F32) return __uint_as_float(word);
    if (dtype == Dtype::BF16) return __uint_as_float(static_cast<uint32_t>(half) << 16);
    return __half2float(__ushort_as_half(half));
  }
};

__device__ __forceinline__ Scale load_scale(const void* scales, uint32_t i, Dtype dtype) {
  Scale scale = {};
  if (dtype == Dtype::F32)
    scale.word = static_cast<const uint32_t*>(scales)[i];
  else
    scale.half = static_cast<const uint16_t*>(scales)[i];
  return scale;
}

}  // namespace cs336::few_rows
