#include "cpu/text/shingles.h"

#include <algorithm>
#include <array>

#include "cpu/text/fold_table.h"
#include "cpu/text/hash.h"
#include "cpu/text/unicode.h"

namespace cs336::text {
namespace {

constexpr uint32_t kDrop = UINT32_MAX, kSpaceCode = ' ';
constexpr uint64_t kBase = 0x9E3779B97F4A7C15u;  // of the rolling hash

// What a code point becomes: itself, another one, a space, or nothing.
const std::vector<uint32_t>& fold_table() {
  static const std::vector<uint32_t> kTable = [] {
    std::vector<uint32_t> table(0x110000);
    for (uint32_t code = 0; code < table.size(); ++code) {
      table[code] = kClassOf[code] & (kSpace | kOther) ? kSpaceCode : code;
    }
    for (uint32_t code = 'A'; code <= 'Z'; ++code) table[code] = code | 32;
    for (const FoldRun& run : kFoldRuns) {
      for (uint32_t i = 0; i < run.count; ++i) {
        const uint32_t folded = run.folded + i;
        table[run.first + i] = kClassOf[folded] & (kSpace | kOther) ? kSpaceCode : folded;
      }
    }
    for (const MarkRun& run : kMarkRuns) std::fill_n(table.begin() + run.first, run.count, kDrop);
    return table;
  }();
  return kTable;
}

void append_code(uint32_t code, std::string& out) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 63));
  } else {
    if (code < 0x10000) {
      out += static_cast<char>(0xE0 | code >> 12);
    } else {
      out += static_cast<char>(0xF0 | code >> 18);
      out += static_cast<char>(0x80 | (code >> 12 & 63));
    }
    out += static_cast<char>(0x80 | (code >> 6 & 63));
    out += static_cast<char>(0x80 | (code & 63));
  }
}

// The two or three letters of a Hangul syllable.
void append_hangul(uint32_t syllable, std::string& out) {
  const uint32_t index = syllable - 0xAC00;
  append_code(0x1100 + index / 588, out);
  append_code(0x1161 + index % 588 / 28, out);
  if (index % 28 > 0) append_code(0x11A7 + index % 28, out);
}

void append_folded(uint32_t code, std::string& out) {
  if (code >= 0xAC00 && code < 0xD7A4) return append_hangul(code, out);
  const uint32_t folded = fold_table()[code];
  if (folded == kDrop) return;
  if (folded != kSpaceCode) return append_code(folded, out);
  if (!out.empty() && out.back() != ' ') out += ' ';
}

// Lower case of letters and digits, 0 for what parts words.
constexpr std::array<char, 128> kAscii = [] {
  std::array<char, 128> table{};
  for (char c = '0'; c <= '9'; ++c) table[static_cast<size_t>(c)] = c;
  for (char c = 'a'; c <= 'z'; ++c) table[static_cast<size_t>(c)] = table[static_cast<size_t>(c - 32)] = c;
  return table;
}();

// hashes of units -> hashes of their n-grams
void roll(const std::vector<uint64_t>& units, size_t n, std::vector<uint64_t>& out) {
  if (units.empty()) return;
  n = std::min(n, units.size());
  uint64_t leaving = 1, hash = 0;
  for (size_t i = 1; i < n; ++i) leaving *= kBase;
  for (size_t i = 0; i < units.size(); ++i) {
    if (i >= n) hash -= units[i - n] * leaving;
    hash = hash * kBase + units[i];
    if (i + 1 >= n) out.push_back(hash_number(hash));
  }
}

}  // namespace

void normalize(std::string_view utf8, std::string& out) {
  out.clear();
  const auto* p = reinterpret_cast<const uint8_t*>(utf8.data());
  const uint8_t* end = p + utf8.size();
  while (p < end) {
    if (*p >= 0x80) {
      const CodePoint c = decode_multibyte(p, end);
      append_folded(c.size == 0 ? kSpaceCode : c.code, out);
      p += std::max<size_t>(c.size, 1);
      continue;
    }
    const char c = kAscii[*p++];
    if (c != 0) {
      out += c;
    } else if (!out.empty() && out.back() != ' ') {
      out += ' ';
    }
  }
  if (!out.empty() && out.back() == ' ') out.pop_back();
}

void units_of(std::string_view utf8, Unit unit, std::string& normalized, std::vector<uint64_t>& units) {
  normalize(utf8, normalized);
  units.clear();
  const std::string_view text = normalized;
  if (unit == Unit::kChar) {
    for (size_t i = 0; i < text.size();) {
      size_t size = 1;
      while (i + size < text.size() && (text[i + size] & 0xC0) == 0x80) ++size;
      units.push_back(hash_bytes(text.substr(i, size)));
      i += size;
    }
    return;
  }
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    units.push_back(hash_bytes(text.substr(begin, end - begin)));
    begin = end + 1;
  }
}

void shingles_into(std::string_view utf8, size_t n, Unit unit, std::string& scratch, std::vector<uint64_t>& out) {
  thread_local std::vector<uint64_t> units;
  units_of(utf8, unit, scratch, units);
  out.clear();
  roll(units, n, out);
}

std::vector<uint64_t> shingles(std::string_view utf8, size_t n, Unit unit) {
  std::string scratch;
  std::vector<uint64_t> all;
  shingles_into(utf8, n, unit, scratch, all);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

double jaccard(std::span<const uint64_t> a, std::span<const uint64_t> b) {
  size_t i = 0, j = 0, common = 0;
  while (i < a.size() && j < b.size()) {
    common += a[i] == b[j];
    const bool advance_a = a[i] <= b[j];
    j += b[j] <= a[i];
    i += advance_a;
  }
  const size_t all = a.size() + b.size() - common;
  return all == 0 ? 1 : static_cast<double>(common) / static_cast<double>(all);
}

}  // namespace cs336::text
