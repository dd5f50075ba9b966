#include "cpu/text/features.h"

#include <algorithm>
#include <array>
#include <bit>

#include "cpu/text/hash.h"
#include "cpu/text/unicode.h"

namespace cs336::text {
namespace {

enum Kind : uint8_t { kGap, kWordPart, kSymbol, kAlone };
constexpr uint64_t kEmpty = UINT64_MAX;  // which no bucket is
constexpr uint64_t kCharSeed = 0x8EBC6AF09C88C6E3u, kPairFactor = 0x589965CC75374CC3u;

constexpr std::array<Kind, 128> kAsciiKind = [] {
  std::array<Kind, 128> table{};
  for (size_t c = 0; c < 128; ++c) {
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    table[c] = letter ? kWordPart : c <= ' ' || c == 127 ? kGap : kSymbol;
  }
  return table;
}();

Kind kind_of(uint16_t cls) {
  if (cls & kSpace) return kGap;
  if (cls & (kHan | kCjk)) return kAlone;
  return cls & (kLetter | kNumber | kMark) ? kWordPart : kSymbol;
}

}  // namespace

void FeatureExtractor::extract(std::string_view utf8, std::vector<uint32_t>& out) {
  lower_.assign(utf8);
  for (char& c : lower_) c = static_cast<char>(c + (static_cast<uint8_t>(c - 'A') < 26) * 32);
  recent_.clear();
  const size_t before = out.size();
  const auto* text = reinterpret_cast<const uint8_t*>(lower_.data());
  const uint8_t *p = text, *begin = text, *end = text + lower_.size();
  Kind open = kGap;  // what the word that began at `begin` is made of
  const auto close = [&] {
    if (open != kGap) add_word({reinterpret_cast<const char*>(begin), static_cast<size_t>(p - begin)}, out);
  };
  while (p < end) {
    const Char c = *p < 0x80 ? Char{0, 1} : multibyte_at(p, end);
    const Kind kind = *p < 0x80 ? kAsciiKind[*p] : kind_of(c.cls);
    if (kind != open || kind == kAlone) {
      close();
      begin = p;
      open = kind;
    }
    p += c.size;
  }
  close();
  keep_distinct(out, before);
}

void FeatureExtractor::keep_distinct(std::vector<uint32_t>& out, size_t begin) {
  const size_t mask = std::bit_ceil(2 * (out.size() - begin) + 1) - 1;
  seen_.assign(mask + 1, kEmpty);
  size_t kept = begin;
  for (size_t i = begin; i < out.size(); ++i) {
    size_t at = out[i] & mask;
    while (seen_[at] != kEmpty && seen_[at] != out[i]) at = (at + 1) & mask;
    if (seen_[at] == out[i]) continue;
    seen_[at] = out[kept++] = out[i];
  }
  out.resize(kept);
}

void FeatureExtractor::add_word(std::string_view word, std::vector<uint32_t>& out) {
  uint64_t hash = hash_bytes(word);
  out.push_back(bucket(hash));
  if (spec_.word_ngrams > 1) {
    const uint64_t own = hash;
    for (const uint64_t before : recent_) out.push_back(bucket(hash = hash_number(hash * kPairFactor + before)));
    if (recent_.size() + 1 == spec_.word_ngrams) recent_.pop_back();
    recent_.insert(recent_.begin(), own);
  }
  if (spec_.char_max > 0 && word.size() <= kLongestWord) add_chars(word, out);
}

void FeatureExtractor::add_chars(std::string_view word, std::vector<uint32_t>& out) const {
  std::array<char, kLongestWord + 2> marked;
  marked[0] = '<';
  std::copy(word.begin(), word.end(), marked.begin() + 1);
  marked[word.size() + 1] = '>';
  std::array<uint8_t, kLongestWord + 3> starts;  // of characters, and where the last one ends
  size_t count = 0;
  for (size_t i = 0; i < word.size() + 2; ++i) {
    if ((marked[i] & 0xC0) != 0x80) starts[count++] = static_cast<uint8_t>(i);
  }
  starts[count] = static_cast<uint8_t>(word.size() + 2);
  for (size_t first = 0; first < count; ++first) {
    for (size_t n = spec_.char_min; n <= spec_.char_max && first + n <= count; ++n) {
      if (n == count) continue;  // the word itself
      const size_t begin = starts[first];
      out.push_back(bucket(hash_bytes({marked.data() + begin, starts[first + n] - begin}, kCharSeed)));
    }
  }
}

}  // namespace cs336::text
