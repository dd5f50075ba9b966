// Words of at most 15 bytes as two integers: bytes 0..14, then the length. Equal words are equal integers.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <random>
#include <string_view>

namespace cs336::text {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed words assume a little-endian machine");

constexpr size_t kMaxShort = 15;

struct ShortWord {
  uint64_t lo = 0, hi = 0;
  bool operator==(const ShortWord& o) const { return ((lo ^ o.lo) | (hi ^ o.hi)) == 0; }
};

// The bytes of a word of each size, as a mask.
inline constexpr auto kWordMasks = [] {
  std::array<ShortWord, kMaxShort + 1> masks{};
  for (size_t size = 1; size <= kMaxShort; ++size) {
    masks[size] = masks[size - 1];
    (size <= 8 ? masks[size].lo : masks[size].hi) |= uint64_t{0xFF} << (size - 1) % 8 * 8;
  }
  return masks;
}();

[[gnu::noinline]] inline ShortWord pack_last_word(const char* p, size_t size) {
  char bytes[16] = {};
  std::memcpy(bytes, p, size);
  ShortWord word;
  std::memcpy(&word.lo, bytes, 8);
  std::memcpy(&word.hi, bytes + 8, 8);
  word.hi |= static_cast<uint64_t>(size) << 56;
  return word;
}

// Needs size <= kMaxShort. Reads 16 bytes where `limit` allows it.
inline ShortWord pack_word(const char* p, size_t size, const char* limit) {
  if (limit - p < 16) [[unlikely]]
    return pack_last_word(p, size);
  uint64_t lo, hi;
  std::memcpy(&lo, p, 8);
  std::memcpy(&hi, p + 8, 8);
  return {lo & kWordMasks[size].lo, (hi & kWordMasks[size].hi) | static_cast<uint64_t>(size) << 56};
}

// Of this process alone, so that nobody can write words that all have one place in a table.
inline const std::array<uint64_t, 2> kSecrets = [] {
  std::random_device random;
  const auto number = [&] { return uint64_t{random()} << 32 | random(); };
  return std::array<uint64_t, 2>{number() | 1, number() | 1};
}();

inline uint64_t mix(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// The upper half of a product depends least on the lowest bits of its factors: they are added again. The lower bits of
// the result are the good ones; its upper bits hardly depend on the first bytes of a short word.
inline uint64_t hash_word(const ShortWord& w) {
  const auto product = static_cast<unsigned __int128>(w.lo ^ kSecrets[0]) * (w.hi ^ kSecrets[1]);
  return static_cast<uint64_t>(product >> 64) ^ w.lo;
}

inline uint64_t hash_bytes(std::string_view s) {
  uint64_t h = s.size();
  size_t i = 0;
  for (; i + 8 <= s.size(); i += 8) {
    uint64_t block;
    std::memcpy(&block, s.data() + i, 8);
    h = mix(h ^ kSecrets[0], block ^ kSecrets[1]);
  }
  uint64_t tail = 0;
  std::memcpy(&tail, s.data() + i, s.size() - i);
  return mix(h ^ kSecrets[0], tail ^ kSecrets[1]);
}

}  // namespace cs336::text
