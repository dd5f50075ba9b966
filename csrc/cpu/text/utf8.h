// UTF-8 from and to the code points that a Python str holds, in one, two or four bytes each.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "cpu/text/huge_pages.h"

namespace cs336::text {

struct CodePoint {
  uint32_t code;
  uint8_t size;  // bytes; 0 where they are not valid UTF-8
};

// Needs *p >= 0x80.
inline CodePoint decode_multibyte(const uint8_t* p, const uint8_t* end) {
  const auto continues = [&](ptrdiff_t i) { return (p[i] & 0xC0) == 0x80; };
  const uint32_t lead = *p;
  const ptrdiff_t left = end - p;
  if (lead >= 0xC2 && lead < 0xE0 && left >= 2 && continues(1)) return {(lead & 0x1F) << 6 | (p[1] & 0x3F), 2};
  if (lead >= 0xE0 && lead < 0xF0 && left >= 3 && continues(1) && continues(2)) {
    const uint32_t code = (lead & 0x0F) << 12 | (p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    if (code >= 0x800 && (code < 0xD800 || code > 0xDFFF)) return {code, 3};
  }
  if (lead >= 0xF0 && lead < 0xF5 && left >= 4 && continues(1) && continues(2) && continues(3)) {
    const uint32_t code = (lead & 0x07) << 18 | (p[1] & 0x3F) << 12 | (p[2] & 0x3F) << 6 | (p[3] & 0x3F);
    if (code >= 0x10000 && code < 0x110000) return {code, 4};
  }
  return {0, 0};
}

// Appends the UTF-8 of code points. Two halves of a surrogate pair are the character they stand for, one alone is
// U+FFFD.
template <class Unit>
void to_utf8(const Unit* text, size_t size, Buffer<char>& out);

// What valid UTF-8 needs: how many code points, and which of 0x7F, 0xFF, 0xFFFF and 0x10FFFF none is above.
struct Extent {
  size_t size = 0;
  uint32_t bound = 0x7F;
};
Extent extent_of(std::string_view utf8);

// Writes the code points of UTF-8 of this extent; false, with an unfinished result, if it is not valid.
template <class Unit>
bool from_utf8(std::string_view utf8, const Extent& extent, Unit* out);

}  // namespace cs336::text
