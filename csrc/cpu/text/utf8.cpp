#include "cpu/text/utf8.h"

#include <algorithm>

#include "cpu/text/interrupt.h"

namespace cs336::text {
namespace {

// Text goes by blocks, of which most hold nothing but ASCII: the compiler makes those loops vectors.
constexpr size_t kBlock = 32;

template <class From, class To>
bool copy_ascii(const From* __restrict from, To* __restrict to) {
  From all = 0;
  for (size_t i = 0; i < kBlock; ++i) all |= from[i];
  if (all >= 0x80) return false;
  for (size_t i = 0; i < kBlock; ++i) to[i] = static_cast<To>(from[i]);
  return true;
}

char* put(uint32_t code, char* out) {
  const auto continuation = [&](int shift) { return static_cast<char>(0x80 | (code >> shift & 0x3F)); };
  if (code >= 0x800 && code < 0x10000) [[likely]] {
    out[0] = static_cast<char>(0xE0 | code >> 12);
    out[1] = continuation(6);
    out[2] = continuation(0);
    return out + 3;
  }
  if (code < 0x800) {
    out[0] = static_cast<char>(0xC0 | code >> 6);
    out[1] = continuation(0);
    return out + 2;
  }
  out[0] = static_cast<char>(0xF0 | code >> 18);
  out[1] = continuation(12);
  out[2] = continuation(6);
  out[3] = continuation(0);
  return out + 4;
}

}  // namespace

template <class Unit>
void to_utf8(const Unit* text, size_t size, Buffer<char>& out) {
  const auto is_half = [](uint32_t code, uint32_t first) { return code - first < 0x400; };
  PollEvery<1 << 15> poll;
  for (size_t i = 0; i < size; poll()) {
    char* const first = out.room(4 * kBlock);
    if (size - i >= kBlock && copy_ascii(text + i, first)) {
      out.advance(kBlock);
      i += kBlock;
      continue;
    }
    // Up to where ASCII goes on.
    char* next = first;
    const size_t end = std::min(size, i + kBlock);
    for (; i < end && text[i] < 0x80; ++i) *next++ = static_cast<char>(text[i]);
    for (; i < end && text[i] >= 0x80; ++i) {
      const uint32_t code = text[i];
      if (code - 0xD800 >= 0x800) [[likely]] {
        next = put(code, next);
      } else if (is_half(code, 0xD800) && i + 1 < size && is_half(text[i + 1], 0xDC00)) {
        next = put(0x10000 + ((code - 0xD800) << 10) + (text[++i] - 0xDC00), next);
      } else {
        next = put(0xFFFD, next);
      }
    }
    out.advance(static_cast<size_t>(next - first));
  }
}
template void to_utf8(const uint8_t*, size_t, Buffer<char>&);
template void to_utf8(const uint16_t*, size_t, Buffer<char>&);
template void to_utf8(const uint32_t*, size_t, Buffer<char>&);

Extent extent_of(std::string_view utf8) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(utf8.data());
  Extent extent;
  uint8_t top = 0;
  for (size_t i = 0; i < utf8.size();) {
    const size_t end = std::min(utf8.size(), i + 128);
    uint8_t begun = 0;
    for (; i < end; ++i) {
      begun += (bytes[i] & 0xC0) != 0x80;
      top = std::max(top, bytes[i]);
    }
    extent.size += begun;
  }
  extent.bound = top < 0x80 ? 0x7F : top < 0xC4 ? 0xFF : top < 0xF0 ? 0xFFFF : 0x10FFFF;
  return extent;
}

template <class Unit>
bool from_utf8(std::string_view utf8, const Extent& extent, Unit* out) {
  const auto* p = reinterpret_cast<const uint8_t*>(utf8.data());
  const uint8_t* const end = p + utf8.size();
  const Unit* const last = out + extent.size;  // beyond it only where the text is not valid
  while (p < end) {
    const size_t left = std::min<size_t>(end - p, last - out);
    if (left >= kBlock && copy_ascii(p, out)) {
      p += kBlock;
      out += kBlock;
      continue;
    }
    const uint8_t* const stop = p + std::min<size_t>(end - p, kBlock);
    const Unit* const room = out + std::min<size_t>(last - out, kBlock);
    while (p < stop && *p < 0x80 && out < room) *out++ = *p++;
    while (p < stop && *p >= 0x80) {
      const CodePoint c = decode_multibyte(p, end);
      if (c.size == 0 || out == last) return false;
      *out++ = static_cast<Unit>(c.code);
      p += c.size;
    }
    if (p < stop && out == last) return false;
  }
  return true;
}
template bool from_utf8(std::string_view, const Extent&, uint8_t*);
template bool from_utf8(std::string_view, const Extent&, uint16_t*);
template bool from_utf8(std::string_view, const Extent&, uint32_t*);

}  // namespace cs336::text
