#include "cpu/text/joints.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "cpu/text/interrupt.h"
#include "cpu/text/word.h"

namespace cs336::text {

Joints::Joints(const std::vector<std::string_view>& tokens, std::vector<bool> known, bool before_spaces)
    : known_(std::move(known)), before_spaces_(before_spaces) {
  std::vector<std::pair<uint32_t, uint32_t>> pairs;
  for (const std::string_view token : tokens) {
    CodePoint left = char_at(token, 0);
    for (size_t i = left.size; i < token.size();) {
      const CodePoint right = char_at(token, i);
      pairs.emplace_back(left.code, right.code);
      left = right;
      i += right.size;
    }
  }
  std::sort(pairs.begin(), pairs.end());
  pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
  const size_t places = std::bit_ceil(16 * pairs.size() + 1024);
  together_.resize(places);
  shift_ = 64 - std::countr_zero(places);
  for (const auto& [left, right] : pairs) together_[place_of(left, right)] = true;
  for (uint32_t left = 0; left < 128; ++left) {
    for (uint32_t right = 0; right < 128; ++right) ascii_apart_[left << 7 | right] = apart_anywhere(left, right);
  }
}

// A byte that is no character is one of no code; a mark is a space.
CodePoint Joints::char_at(std::string_view text, size_t at) {
  const auto* p = reinterpret_cast<const uint8_t*>(text.data()) + at;
  if (*p < 0x80) return {*p, 1};
  const CodePoint c = decode_multibyte(p, reinterpret_cast<const uint8_t*>(text.data()) + text.size());
  if (c.size == 0) return {kNoCode, 1};
  return {c.code == kSpaceMark ? uint32_t{' '} : c.code, c.size};
}

size_t Joints::place_of(uint32_t left, uint32_t right) const {
  return ((uint64_t{left} << 32 | right) * kSecrets[0]) >> shift_;
}

bool Joints::apart_anywhere(uint32_t left, uint32_t right) const {
  if (before_spaces_ && right == ' ') return true;
  if (!known_.empty() && !is_known(left) && !is_known(right)) return false;  // one token, if both are no tokens
  return !together_[place_of(left, right)];
}

[[gnu::noinline]] size_t Joints::split(std::string_view text, size_t begin, size_t* ends, size_t capacity) const {
  size_t count = 0;
  CodePoint c = char_at(text, begin);
  uint32_t left = c.code;
  for (size_t i = begin + c.size; count < capacity; i += c.size, left = c.code) {
    if (i == text.size()) {
      ends[count++] = i;
      break;
    }
    c = char_at(text, i);
    ends[count] = i;
    count += apart(left, c.code);
  }
  return count;
}

size_t Joints::stable_prefix(std::string_view text) const {
  PollEvery<1 << 16> poll;
  for (size_t at = text.size(); at-- > 1; poll()) {
    const CodePoint right = char_at(text, at);
    if (right.code == kNoCode) continue;  // or the first bytes of a character that is not here yet
    size_t before = at - 1;
    while (before > 0 && at - before < 4 && (text[before] & 0xC0) == 0x80) --before;
    const CodePoint left = char_at(text, before);
    if (apart(before + left.size == at ? left.code : kNoCode, right.code)) return at;
  }
  return 0;
}

}  // namespace cs336::text
