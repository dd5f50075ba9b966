#include "cpu/text/unicode.h"

#include <cstring>
#include <iterator>

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

}  // namespace cs336::text
