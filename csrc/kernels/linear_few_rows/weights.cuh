// Weights as a linear layer of few rows meets them: eight features of a row, from however few bits, as four pairs of
// x's dtype, T. All conversions are exact: whole numbers up to 256 and floats of eight bits are bfloat16s and halves.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/vec.cuh"
#include "kernels/linear_few_rows/linear_few_rows.h"

namespace cs336::few_rows {

using cuda::WeightFormat;

template <typename T>
inline constexpr bool kHalf = std::is_same_v<T, __half>;

// One 16-bit pattern, or number, twice.
__device__ __forceinline__ constexpr uint32_t twice(uint32_t bits) { return bits | bits << 16; }

// (a & mask) | bits, in one instruction.
__device__ __forceinline__ uint32_t masked(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(mask), "r"(bits));
  return result;
}

template <typename T>
__device__ __forceinline__ uint32_t minus(uint32_t a, uint32_t b) {
  if constexpr (kHalf<T>) {
    const __half2 d = __hsub2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const uint32_t&>(d);
  } else {
    const auto d = __hsub2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(d);
  }
}

template <typename T>
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
  if constexpr (kHalf<T>) {
    const __half2 d = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const uint32_t&>(d);
  } else {
    const auto d = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(d);
  }
}

template <typename T>
__device__ __forceinline__ float sum_of_pair(uint32_t pair) {
  if constexpr (kHalf<T>) {
    const float2 both = __half22float2(reinterpret_cast<const __half2&>(pair));
    return both.x + both.y;
  } else {
    return __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
  }
}

// kBytes: of a piece, 32 features of a row; kPieces: in a chunk of 64 bytes. `take` gives eight features, the j-th of
// the 16 bytes that a lane has of a chunk, each with kOffset added, and `in_order` those of x in the same order.
template <typename T, WeightFormat kFormat>
struct Weights;

template <typename T>
struct Weights<T, WeightFormat::kLikeX> {
  static constexpr int kBytes = 64, kPieces = 1, kOffset = 0;

  __device__ __forceinline__ static uint4 in_order(const uint4& x) { return x; }

  __device__ __forceinline__ static void take(uint32_t (&w)[4], const uint4& v, int) {
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  }
};

// Two formats of a byte, which differ in what a pair of bytes becomes.
template <typename T, typename Convert>
struct Bytes {
  static constexpr int kBytes = 32, kPieces = 2, kOffset = 0;

  __device__ __forceinline__ static uint4 in_order(const uint4& x) { return x; }

  __device__ __forceinline__ static void take(uint32_t (&w)[4], const uint4& v, int j) {
    const uint32_t first = j ? v.z : v.x, second = j ? v.w : v.y;
    w[0] = Convert::template pair<0>(first), w[1] = Convert::template pair<1>(first);
    w[2] = Convert::template pair<0>(second), w[3] = Convert::template pair<1>(second);
  }
};

template <typename T>
struct FromInt8 {
  // A float's last bits count in ones where its exponent says 2^7 (bfloat16) or 2^10 (half).
  template <int kPair>
  __device__ __forceinline__ static uint32_t pair(uint32_t word) {
    constexpr uint32_t kSelect = kPair ? 0x4342 : 0x4140;  // bytes 2 and 3, or 0 and 1, each below one of the others
    if constexpr (kHalf<T>) {
      const uint32_t bits = __byte_perm(word ^ 0x80808080u, 0x64646464u, kSelect);  // 1024 + 128 + q
      return minus<T>(bits, twice(0x6480));
    } else {
      const uint32_t bits = __byte_perm(word, 0, kSelect);
      const uint32_t low = masked(bits, twice(0x7f), twice(0x4300));   // 128 + the lower seven bits
      const uint32_t sign = masked(bits, twice(0x80), twice(0x4300));  // 128, or 256 where the sign is set
      return minus<T>(low, sign);
    }
  }
};

template <typename T>
struct FromFp8 {
  // sign, 4 bits of exponent and 3 of mantissa, moved to where T has them: too small by a power of two.
  template <int kPair>
  __device__ __forceinline__ static uint32_t pair(uint32_t word) {
    const uint32_t bits = __byte_perm(word, 0, kPair ? 0x3424 : 0x1404);  // bytes at the top of each half
    const uint32_t magnitude = (bits & twice(0x7f00)) >> (kHalf<T> ? 1 : 4);
    return times<T>((bits & twice(0x8000)) | magnitude, twice(kHalf<T> ? 0x5c00 : 0x7b80));  // 2^8, 2^120
  }
};

template <typename T>
struct Weights<T, WeightFormat::kInt8> : Bytes<T, FromInt8<T>> {};

template <typename T>
struct Weights<T, WeightFormat::kFp8> : Bytes<T, FromFp8<T>> {};

template <typename T>
struct Weights<T, WeightFormat::kInt4> {
  static constexpr int kBytes = 16, kPieces = 4;
  static constexpr int kOffset = kHalf<T> ? 0 : 136;  // 128 + 8: left to the sums of x, which float32 holds well enough

  // Features 0 and 4, 1 and 5, 2 and 6, 3 and 7: as a word gives them.
  __device__ __forceinline__ static uint4 in_order(const uint4& x) {
    return {__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632), __byte_perm(x.y, x.w, 0x5410),
            __byte_perm(x.y, x.w, 0x7632)};
  }

  __device__ __forceinline__ static void take(uint32_t (&w)[4], const uint4& v, int j) {
    const uint32_t word = j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      w[i] = masked(word >> 4 * i, twice(0xf), twice(kHalf<T> ? 0x6400 : 0x4300));  // 1024 or 128, + 8 + q
      if constexpr (kHalf<T>) w[i] = minus<T>(w[i], twice(0x6408));
    }
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
