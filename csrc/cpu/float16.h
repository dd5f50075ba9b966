// The 16-bit element types of CPU kernels: float(x) widens, T(f) rounds to nearest even. NaN stays NaN.
// Without branches, so that loops over them vectorise on any machine: gcc 12 leaves _Float16 scalar, and also an
// assignment that the compiler made.
#pragma once
#include <bit>
#include <cstdint>

#include "common/dtype.h"

namespace cs336 {

struct Half {
  uint16_t bits;

  Half() = default;
  Half(const Half&) = default;
  [[gnu::always_inline]] Half& operator=(const Half& other) {
    bits = other.bits;
    return *this;
  }
  [[gnu::always_inline]] explicit Half(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f), magnitude = u & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t rounded = magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? subnormal : normal;
    bits = static_cast<uint16_t>(rounded | ((u >> 16) & 0x8000));
  }
  [[gnu::always_inline]] explicit operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
    const uint32_t normal = magnitude + 0x38000000, special = magnitude + 0x70000000;
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude + 0x38800000) - 0x1p-14f);
    const uint32_t widened = magnitude >= 0x0f800000 ? special : magnitude < 0x00800000 ? subnormal : normal;
    return std::bit_cast<float>(widened | sign);
  }
};

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  BFloat16(const BFloat16&) = default;
  [[gnu::always_inline]] BFloat16& operator=(const BFloat16& other) {
    bits = other.bits;
    return *this;
  }
  [[gnu::always_inline]] explicit BFloat16(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
  [[gnu::always_inline]] explicit operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

namespace cpu {
template <typename F>
auto dispatch_dtype(Dtype dtype, F&& f) {
  return cs336::dispatch_dtype<Half, BFloat16>(dtype, std::forward<F>(f));
}
}  // namespace cpu

// n elements at once, with the machine's own instructions for float16 where it has them: four times as fast.
void widen(const Half* src, int64_t n, float* dst);
void widen(const BFloat16* src, int64_t n, float* dst);
void narrow(const float* src, int64_t n, Half* dst);
void narrow(const float* src, int64_t n, BFloat16* dst);

// y = (x - mean) * scale * w + b, rounded to the element type; b may be null.
void normalise(const float* x, int64_t n, float mean, float scale, const float* w, const float* b, Half* y);
void normalise(const float* x, int64_t n, float mean, float scale, const float* w, const float* b, BFloat16* y);
void normalise(const float* x, int64_t n, float mean, float scale, const float* w, const float* b, float* y);

// sum = a + b, rounded to the element type.
void add(const Half* a, const Half* b, int64_t n, Half* sum);
void add(const BFloat16* a, const BFloat16* b, int64_t n, BFloat16* sum);
void add(const float* a, const float* b, int64_t n, float* sum);

}  // namespace cs336
