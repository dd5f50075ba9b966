// The 16-bit element types of CPU kernels: float(x) widens, T(f) rounds to nearest even. NaN stays NaN.
#pragma once
#include <bit>
#include <cstdint>

namespace cs336 {

using Half = _Float16;

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  [[gnu::always_inline]] explicit BFloat16(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
  [[gnu::always_inline]] explicit operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

}  // namespace cs336
