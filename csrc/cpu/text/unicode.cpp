#include "cpu/text/unicode.h"

#include <array>
#include <cstring>
#include <iterator>
#include <memory>

#include "cpu/text/unicode_table.h"

namespace cs336::text {
namespace {

constexpr size_t kCodePoints = 0x110000;

const uint8_t* build_table() {
  static uint8_t table[kCodePoints];  // flat: text touches a few pages of it
  for (size_t i = 0; i < std::size(kUnicodeRuns); ++i) {
    const size_t first = kUnicodeRuns[i] >> 4, index = kUnicodeRuns[i] & 15;
    const size_t last = i + 1 < std::size(kUnicodeRuns) ? kUnicodeRuns[i + 1] >> 4 : kCodePoints;
    std::memset(table + first, index == 0 || index == 8 ? kOther : 1 << (index - 1), last - first);
  }
  return table;
}

}  // namespace

const uint8_t* const kClassOf = build_table();

Char decode_multibyte(const uint8_t* p, const uint8_t* end) {
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
    if (code >= 0x10000 && code < kCodePoints) return {kClassOf[code], 4};
  }
  return {kOther, 1};
}

}  // namespace cs336::text
