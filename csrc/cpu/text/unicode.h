// Classes of code points, and UTF-8 read one character at a time.
// A byte that is not part of valid UTF-8 counts as one character (kOther), as Python's "surrogateescape" has it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/text/utf8.h"

namespace cs336::text {

// Bits, so that a set of classes is one mask. Every character has exactly one of the first eight.
enum CharClass : uint16_t {
  kNewline = 1,  // \r and \n, which are white space too
  kBlank = 2,    // the other white space
  kNumber = 4,
  kUpper = 8,      // Lu, Lt
  kLower = 16,     // Ll
  kCaseless = 32,  // Lm, Lo
  kMark = 64,
  kOther = 128,  // punctuation, symbols, controls, unassigned, invalid bytes
  // Beside those:
  kPunctuation = 256,  // \p{P} and \p{S}
  kHan = 512,          // \p{Han}
  kCjk = 1024,         // U+3040 to U+30FF and U+4E00 to U+9FA5, assigned or not: what DeepSeek splits off
  kSpace = kNewline | kBlank,
  kLetter = kUpper | kLower | kCaseless,
};

extern const uint16_t* const kClassOf;  // indexed by code point

struct Char {
  uint16_t cls;
  uint8_t size;  // bytes
};

// The character at p. Needs *p >= 0x80.
inline Char multibyte_at(const uint8_t* p, const uint8_t* end) {
  const CodePoint c = decode_multibyte(p, end);
  return c.size == 0 ? Char{kOther, 1} : Char{kClassOf[c.code], c.size};
}

// The character at p; needs p < end.
inline Char char_at(const uint8_t* p, const uint8_t* end) {
  return *p < 0x80 ? Char{kClassOf[*p], 1} : multibyte_at(p, end);
}

}  // namespace cs336::text
