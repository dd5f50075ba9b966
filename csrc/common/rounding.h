// A float32 as bfloat16 and the 16 bits that this leaves, as cs336/ops/ref/rounding.py: joined, they are it again.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define ROUNDING_INLINE __host__ __device__ __forceinline__
#else
#define ROUNDING_INLINE inline
#endif

namespace cs336 {

struct Halves {
  uint16_t high;      // bfloat16: rounded to nearest, ties away from zero
  int16_t remainder;  // of the bit pattern; 0 for NaN
};

ROUNDING_INLINE Halves split_bits(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {.high = 0x7fc0, .remainder = 0};  // half more would make it -0
  const uint32_t high = (bits + 0x8000u) & 0xffff0000u;
  return {.high = static_cast<uint16_t>(high >> 16), .remainder = static_cast<int16_t>(bits - high)};
}

ROUNDING_INLINE uint32_t join_bits(Halves halves) {
  return (static_cast<uint32_t>(halves.high) << 16) + static_cast<uint32_t>(static_cast<int32_t>(halves.remainder));
}

#ifdef __CUDACC__
__device__ __forceinline__ float join(__nv_bfloat16 p, int16_t remainder) {
  return __uint_as_float(join_bits({.high = __bfloat16_as_ushort(p), .remainder = remainder}));
}

__device__ __forceinline__ void split(float x, __nv_bfloat16& p, int16_t& remainder) {
  const Halves halves = split_bits(__float_as_uint(x));
  p = __ushort_as_bfloat16(halves.high);
  remainder = halves.remainder;
}
#endif

}  // namespace cs336
