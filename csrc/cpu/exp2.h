// Powers of 2 in loops that vectorise.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>

#define INLINE __attribute__((always_inline)) inline

namespace cs336::cpu {

inline constexpr float kLog2E = 1.4426950408889634f;

// 2^x for x <= 0, to an ulp or two; 0 below the normal numbers. Without branches, so that loops over it vectorise.
INLINE float exp2_of(float x) {
  constexpr float kRound = 12582912.f;  // adding 1.5 * 2^23 rounds to an integer, in the low bits
  const float clamped = std::max(x, -126.f), shifted = clamped + kRound, r = clamped - (shifted - kRound);
  float y = 1.5252734e-5f;
  y = y * r + 1.5403530e-4f;
  y = y * r + 1.3333558e-3f;
  y = y * r + 9.6181291e-3f;
  y = y * r + 5.5504109e-2f;
  y = y * r + 2.4022651e-1f;
  y = y * r + 6.9314718e-1f;
  y = y * r + 1.f;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound) + 127) << 23;
  return x < -126.f ? 0.f : y * std::bit_cast<float>(power);
}

}  // namespace cs336::cpu
