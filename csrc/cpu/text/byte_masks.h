// Which of 64 bytes are what, one bit a byte: bit i is byte i.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace cs336::text {

#ifdef __SSE2__
// Sixteen bytes at once; each question is answered by one bit a byte.
class Bytes {
 public:
  static constexpr int kSize = 16;
  explicit Bytes(const uint8_t* p) : v_(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) {}
  uint64_t equal(uint8_t c) const { return bits(_mm_cmpeq_epi8(v_, _mm_set1_epi8(static_cast<char>(c)))); }
  uint64_t within(uint8_t low, uint8_t high) const {
    const __m128i offset = _mm_sub_epi8(v_, _mm_set1_epi8(static_cast<char>(low)));
    return bits(_mm_cmpeq_epi8(_mm_min_epu8(offset, _mm_set1_epi8(static_cast<char>(high - low))), offset));
  }
  uint64_t high() const { return bits(v_); }
  // With upper case letters as lower case.
  Bytes lower() const { return Bytes(_mm_or_si128(v_, _mm_set1_epi8(0x20))); }

 private:
  explicit Bytes(__m128i v) : v_(v) {}
  static uint64_t bits(__m128i v) { return static_cast<uint64_t>(_mm_movemask_epi8(v)); }
  __m128i v_;
};
#else
class Bytes {
 public:
  static constexpr int kSize = 1;
  explicit Bytes(const uint8_t* p) : v_(*p) {}
  uint64_t equal(uint8_t c) const { return v_ == c; }
  uint64_t within(uint8_t low, uint8_t high) const { return v_ >= low && v_ <= high; }
  uint64_t high() const { return v_ >= 0x80; }
  Bytes lower() const { return Bytes(static_cast<uint8_t>(v_ | 0x20)); }

 private:
  explicit Bytes(uint8_t v) : v_(v) {}
  uint8_t v_;
};
#endif

struct ByteMasks {
  uint64_t letter = 0, number = 0;  // ASCII letters and digits
  uint64_t upper = 0, lower = 0;
  uint64_t space = 0;    // ' '
  uint64_t white = 0;    // ' ', \t, \n, \v, \f, \r
  uint64_t newline = 0;  // \n, \r
  uint64_t apostrophe = 0;
  uint64_t high = 0;  // not ASCII
};

inline ByteMasks classify(const uint8_t* bytes) {
  ByteMasks m;
  for (int at = 0; at < 64; at += Bytes::kSize) {
    const Bytes b(bytes + at);
    const uint64_t space = b.equal(' ');
    m.letter |= b.lower().within('a', 'z') << at;
    m.upper |= b.within('A', 'Z') << at;
    m.lower |= b.within('a', 'z') << at;
    m.number |= b.within('0', '9') << at;
    m.space |= space << at;
    m.white |= (space | b.within('\t', '\r')) << at;
    m.newline |= (b.equal('\n') | b.equal('\r')) << at;
    m.apostrophe |= b.equal('\'') << at;
    m.high |= b.high() << at;
  }
  return m;
}

// The first bytes of U+4E00 to U+9FFF, most of Chinese text: all of them letters without case.
inline uint64_t ideographs(const uint8_t* bytes) {
  uint64_t lead = 0, e4 = 0, next = 0, from_b8 = 0;
  for (int at = 0; at < 64; at += Bytes::kSize) {
    const Bytes b(bytes + at);
    lead |= b.within(0xE5, 0xE9) << at;
    e4 |= b.equal(0xE4) << at;
    next |= b.within(0x80, 0xBF) << at;
    from_b8 |= b.within(0xB8, 0xBF) << at;
  }
  return (lead | (e4 & (from_b8 >> 1))) & (next >> 1) & (next >> 2);
}

}  // namespace cs336::text
