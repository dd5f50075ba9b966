// 64-bit hashes of bytes and of numbers: fast, not secret, the same on every machine of one byte order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace cs336::text {

// Both halves of the 128-bit product.
inline uint64_t mix(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t hash_number(uint64_t x, uint64_t seed = 0) {
  return mix(x ^ 0x9E3779B97F4A7C15u ^ seed, 0xD6E8FEB86659FD93u);
}

inline uint64_t hash_bytes(std::string_view bytes, uint64_t seed = 0) {
  constexpr uint64_t kA = 0x2D358DCCAA6C78A5u, kB = 0x8BB84B93962EACC9u, kC = 0x4B33A62ED433D4A3u;
  const char* p = bytes.data();
  size_t left = bytes.size();
  uint64_t state = seed ^ kC;
  const auto word = [](const char* from, size_t size) {
    uint64_t value = 0;
    std::memcpy(&value, from, size);
    return value;
  };
  for (; left > 16; left -= 16, p += 16) state = mix(word(p, 8) ^ kA ^ state, word(p + 8, 8) ^ kB);
  uint64_t low = 0, high = 0;  // of the last 1 to 16 bytes; they may overlap
  if (left >= 8) {
    low = word(p, 8);
    high = word(p + left - 8, 8);
  } else if (left >= 4) {
    low = word(p, 4);
    high = word(p + left - 4, 4);
  } else if (left > 0) {
    low = static_cast<uint64_t>(static_cast<uint8_t>(p[0])) << 16 |
          static_cast<uint64_t>(static_cast<uint8_t>(p[left / 2])) << 8 | static_cast<uint8_t>(p[left - 1]);
  }
  // The length joins where nothing of the bytes is left to cancel it: beside the first ones, "1..." of 20 bytes would
  // be "5..." of 16.
  return mix(mix(low ^ kA ^ state, high ^ kB) ^ bytes.size(), kA);
}

}  // namespace cs336::text
