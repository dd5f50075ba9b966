// Classes of code points, and UTF-8 read one character at a time.
// A byte that is not part of valid UTF-8 counts as one character (kOther), as Python's "surrogateescape" has it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cs336::text {

// Bits, so that a set of classes is one mask. Every character has exactly one.
enum CharClass : uint8_t {
  kNewline = 1,  // \r and \n, which are white space too
  kBlank = 2,    // the other white space
  kNumber = 4,
  kUpper = 8,      // Lu, Lt
  kLower = 16,     // Ll
  kCaseless = 32,  // Lm, Lo
  kMark = 64,
  kOther = 128,  // punctuation, symbols, controls, unassigned, invalid bytes
  kSpace = kNewline | kBlank,
  kLetter = kUpper | kLower | kCaseless,
};

extern const uint8_t* const kClassOf;  // indexed by code point

struct Char {
  uint8_t cls;
  uint8_t size;  // bytes
};

// Needs *p >= 0x80.
inline Char decode_multibyte(const uint8_t* p, const uint8_t* end) {
  const auto continues = [&](ptrdiff_t i) { return (p[i] & 0xC0) == 0x80; };
  const uint32_t lead = *p;
  const ptrdiff_t left = end - p;
  if (lead >= 0xC2 && lead < 0xE0 && left >= 2 && continues(1)) {
    return {kClassOf[(lead & 0x1F) << 6 | (p[1] & 0x3F)], 2};
  }
  if (lead >= 0xE0 && lead < 0xF0 && left >= 3 && continues(1) && continues(2)) {
    const uint32_t code = (lead & 0x0F) << 12 | (p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    if (code >= 0x800 && (code < 0xD800 || code > 0xDFFF)) return {kClassOf[code], 3};
  }
  if (lead >= 0xF0 && lead < 0xF5 && left >= 4 && continues(1) && continues(2) && continues(3)) {
    const uint32_t code = (lead & 0x07) << 18 | (p[1] & 0x3F) << 12 | (p[2] & 0x3F) << 6 | (p[3] & 0x3F);
    if (code >= 0x10000 && code < 0x110000) return {kClassOf[code], 4};
  }
  return {kOther, 1};
}

// The character at p; needs p < end.
inline Char char_at(const uint8_t* p, const uint8_t* end) {
  if (*p < 0x80) return {kClassOf[*p], 1};
  return decode_multibyte(p, end);
}

}  // namespace cs336::text
