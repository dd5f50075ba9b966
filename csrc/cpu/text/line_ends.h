// Lines by every line end of Unicode, as Python's str.splitlines has them.
#pragma once
#include <cstddef>
#include <string_view>

namespace cs336::text {

// Bytes of the line end at a place; 0 if there is none.
inline size_t line_end_at(std::string_view text, size_t at) {
  const char c = text[at];
  if (c >= 0x20) return 0;
  if (c == '\r') return at + 1 < text.size() && text[at + 1] == '\n' ? 2 : 1;
  if (c == '\n' || c == '\v' || c == '\f' || (c >= 0x1C && c <= 0x1E)) return 1;
  if (text.substr(at, 2) == "\xC2\x85") return 2;
  return text.substr(at, 3) == "\xE2\x80\xA8" || text.substr(at, 3) == "\xE2\x80\xA9" ? 3 : 0;
}

// visit(line) -> whether to go on. There is no empty line after the last line end.
template <class Visit>
void for_each_line(std::string_view text, Visit&& visit) {
  size_t begin = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t size = line_end_at(text, i);
    if (size == 0) {
      ++i;
      continue;
    }
    if (!visit(text.substr(begin, i - begin))) return;
    begin = i += size;
  }
  if (begin < text.size()) visit(text.substr(begin));
}

}  // namespace cs336::text
