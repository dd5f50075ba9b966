// Classes of code points, and UTF-8 read one character at a time.
// A byte that is not part of valid UTF-8 counts as one character (kOther), as Python's "surrogateescape" has it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/text/utf8.h"

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
