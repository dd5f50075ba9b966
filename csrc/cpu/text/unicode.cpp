#include "cpu/text/unicode.h"

#include <algorithm>
#include <iterator>

#include "cpu/text/unicode_table.h"

namespace cs336::text {
namespace {

constexpr size_t kCodePoints = 0x110000;

const uint16_t* build_table() {
  static uint16_t table[kCodePoints];  // flat: text touches a few pages of it
  for (size_t i = 0; i < std::size(kUnicodeRuns); ++i) {
    const size_t first = kUnicodeRuns[i] >> 8, index = kUnicodeRuns[i] & 15;
    const size_t last = i + 1 < std::size(kUnicodeRuns) ? kUnicodeRuns[i + 1] >> 8 : kCodePoints;
    const uint32_t beside = (kUnicodeRuns[i] >> 4 & 7) * kPunctuation;
    const uint32_t one = index == 0 || index == 8 ? kOther : 1 << (index - 1);
    std::fill(table + first, table + last, static_cast<uint16_t>(one | beside));
  }
  return table;
}

}  // namespace

const uint16_t* const kClassOf = build_table();

}  // namespace cs336::text
