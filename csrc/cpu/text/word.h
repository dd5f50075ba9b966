// Words of at most 15 bytes as two integers: bytes 0..14, then the length. Equal words are equal integers.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace cs336::text {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed words assume a little-endian machine");

constexpr size_t kMaxShort = 15;

struct ShortWord {
  uint64_t lo = 0, hi = 0;
  bool operator==(const ShortWord&) const = default;
};

inline ShortWord mask_word(uint64_t lo, uint64_t hi, size_t size) {
  static constexpr auto kMask = [] {
    std::array<uint64_t, 9> mask{};
    for (size_t i = 1; i <= 8; ++i) mask[i] = mask[i - 1] << 8 | 0xFF;
    return mask;
  }();
  return size <= 8 ? ShortWord{lo & kMask[size], static_cast<uint64_t>(size) << 56}
                   : ShortWord{lo, (hi & kMask[size - 8]) | static_cast<uint64_t>(size) << 56};
}

// Needs size <= kMaxShort. Reads 16 bytes where `limit` allows it.
inline ShortWord pack_word(const char* p, size_t size, const char* limit) {
  uint64_t half[2] = {0, 0};
  std::memcpy(half, p, limit - p >= 16 ? 16 : size);
  return mask_word(half[0], half[1], size);
}

inline uint64_t mix(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t hash_word(const ShortWord& w) { return mix(w.lo ^ 0x9E3779B97F4A7C15u, w.hi ^ 0xD6E8FEB86659FD93u); }

inline uint64_t hash_bytes(std::string_view s) {
  uint64_t h = s.size();
  size_t i = 0;
  for (; i + 8 <= s.size(); i += 8) {
    uint64_t block;
    std::memcpy(&block, s.data() + i, 8);
    h = mix(h ^ 0x9E3779B97F4A7C15u, block ^ 0xD6E8FEB86659FD93u);
  }
  uint64_t tail = 0;
  std::memcpy(&tail, s.data() + i, s.size() - i);
  return mix(h ^ 0x9E3779B97F4A7C15u, tail ^ 0xD6E8FEB86659FD93u);
}

}  // namespace cs336::text
