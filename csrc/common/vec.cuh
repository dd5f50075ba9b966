// 16-byte vectors, the unit in which memory-bound kernels touch global memory, and what they hold in fp32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace cs336 {

template <typename T>
inline constexpr int kVec = 16 / sizeof(T);  // elements in 16 bytes

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& packed, float (&out)[kVec<T>]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (std::is_same_v<T, float>) {
      out[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&in)[kVec<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = __float_as_uint(in[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      reinterpret_cast<__nv_bfloat162&>(words[i]) = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    } else {
      reinterpret_cast<__half2&>(words[i]) = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Makes the compiler derive again what it has derived from a register before (floats from packed ones, addresses from a
// column), instead of keeping it alive: that takes up to twice as many registers.
__device__ __forceinline__ void forget_derived(int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void forget_derived(uint4& packed) {
  asm volatile("" : "+r"(packed.x), "+r"(packed.y), "+r"(packed.z), "+r"(packed.w));
}

// ---- global memory ----

// Whether M rows with these strides, and what else there is a pointer to, all start at multiples of 16 bytes.
inline bool all_aligned(int64_t M, int64_t element_size, std::initializer_list<int64_t> strides,
                        std::initializer_list<const void*> pointers) {
  const auto stride_fits = [&](int64_t stride) { return M <= 1 || stride * element_size % 16 == 0; };
  const auto pointer_fits = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return std::all_of(strides.begin(), strides.end(), stride_fits) &&
         std::all_of(pointers.begin(), pointers.end(), pointer_fits);
}

enum class Access { kVectors, kElements };  // 16 bytes at once, where they are aligned, or one element after the other

// Not through the read-only path (__ldg): a predecessor may still be writing when the kernel starts.
template <typename T, Access kAccess = Access::kVectors>
__device__ __forceinline__ uint4 load(const void* global, int64_t element) {
  if constexpr (kAccess == Access::kVectors) {
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(global) + element);
  } else if constexpr (sizeof(T) == 4) {
    const uint32_t* words = static_cast<const uint32_t*>(global) + element;
    return {words[0], words[1], words[2], words[3]};
  } else {
    const uint16_t* halves = static_cast<const uint16_t*>(global) + element;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = halves[2 * i] | static_cast<uint32_t>(halves[2 * i + 1]) << 16;
    return {words[0], words[1], words[2], words[3]};
  }
}

template <typename T>
__device__ __forceinline__ void store(void* global, int64_t element, const uint4& packed) {
  *reinterpret_cast<uint4*>(static_cast<T*>(global) + element) = packed;
}

}  // namespace cs336
