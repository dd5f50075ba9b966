// Character references: &amp; &#8212; &#x2014;
#include <cstring>
#include <string_view>
#include <unordered_map>

#include "cpu/text/html.h"
#include "cpu/text/html_entities.h"

namespace cs336::text {
namespace {

constexpr size_t kLongestName = 32;

struct Reference {
  std::string_view text;
  bool bare;  // also without ";"
};

std::unordered_map<std::string_view, Reference> build_table() {
  std::unordered_map<std::string_view, Reference> table;
  for (size_t at = 0; at < kHtmlEntities.size();) {
    const size_t mark = kHtmlEntities.find_first_of(" !", at), end = kHtmlEntities.find('\n', mark + 2);
    table[kHtmlEntities.substr(at, mark - at)] = {kHtmlEntities.substr(mark + 1, end - mark - 1),
                                                  kHtmlEntities[mark] == '!'};
    at = end + 1;
  }
  return table;
}

bool is_alnum(char c) { return (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z'); }

void append_code(uint32_t code, std::string& out) {
  // 0x80 to 0x9F mean Windows-1252 in pages.
  static constexpr uint16_t kWindows[32] = {0x20AC, 0x81,   0x201A, 0x192,  0x201E, 0x2026, 0x2020, 0x2021,
                                            0x2C6,  0x2030, 0x160,  0x2039, 0x152,  0x8D,   0x17D,  0x8F,
                                            0x90,   0x2018, 0x2019, 0x201C, 0x201D, 0x2022, 0x2013, 0x2014,
                                            0x2DC,  0x2122, 0x161,  0x203A, 0x153,  0x9D,   0x17E,  0x178};
  if (code >= 0x80 && code < 0xA0) code = kWindows[code - 0x80];
  if (code == 0 || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) code = 0xFFFD;
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
  } else if (code < 0x10000) {
    out += {static_cast<char>(0xE0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 63)),
            static_cast<char>(0x80 | (code & 63))};
  } else {
    out += {static_cast<char>(0xF0 | code >> 18), static_cast<char>(0x80 | (code >> 12 & 63)),
            static_cast<char>(0x80 | (code >> 6 & 63)), static_cast<char>(0x80 | (code & 63))};
  }
}

// How many bytes the number after "&#" takes; 0 if there is none.
size_t append_number(std::string_view digits, std::string& out) {
  const bool hex = !digits.empty() && (digits[0] | 32) == 'x';
  size_t at = hex;
  uint32_t code = 0;
  for (; at < digits.size(); ++at) {
    const char c = digits[at], lower = static_cast<char>(c | 32);
    const bool decimal = c >= '0' && c <= '9';
    if (!decimal && !(hex && lower >= 'a' && lower <= 'f')) break;
    code = code * (hex ? 16 : 10) + static_cast<uint32_t>(decimal ? c - '0' : lower - 'a' + 10);
    if (code > 0x10FFFF) code = 0x110000;  // stays out of range
  }
  if (at == static_cast<size_t>(hex)) return 0;
  append_code(code, out);
  return at + (at < digits.size() && digits[at] == ';');
}

// How many bytes the name after "&" takes; 0 if it is none.
size_t append_name(std::string_view text, std::string& out) {
  static const std::unordered_map<std::string_view, Reference> kTable = build_table();
  size_t size = 0;
  while (size < text.size() && size < kLongestName && is_alnum(text[size])) ++size;
  const bool closed = size < text.size() && text[size] == ';';
  for (size_t length = size; length >= 2; --length) {
    const auto found = kTable.find(text.substr(0, length));
    if (found == kTable.end()) continue;
    const bool whole = closed && length == size;
    if (!whole && !found->second.bare) continue;
    out += found->second.text;
    return length + whole;
  }
  return 0;
}

}  // namespace

void append_unescaped(std::string_view html, std::string& out) {
  for (size_t at = 0; at < html.size();) {
    const size_t mark = std::min(html.find('&', at), html.size());
    out += html.substr(at, mark - at);
    at = mark;
    if (at == html.size()) return;
    const std::string_view rest = html.substr(at + 1);
    const bool number = !rest.empty() && rest[0] == '#';
    const size_t size = number ? append_number(rest.substr(1), out) : append_name(rest, out);
    if (size == 0) out += '&';
    at += 1 + (size == 0 ? 0 : size + number);
  }
}

}  // namespace cs336::text
