#include "cpu/text/special.h"

#include <algorithm>
#include <cstring>

#include "cpu/text/interrupt.h"
#include "cpu/text/unicode.h"

namespace cs336::text {

SpecialTokens::SpecialTokens(std::vector<std::string> texts, std::vector<Strips> strips)
    : texts_(std::move(texts)), strips_(std::move(strips)), nodes_(1) {
  strips_left_ = std::any_of(strips_.begin(), strips_.end(), [](const Strips& s) { return s.left; });
  for (size_t index = 0; index < texts_.size(); ++index) {
    uint32_t node = 0;
    for (const char c : texts_[index]) {
      const auto byte = static_cast<uint8_t>(c);
      auto& children = nodes_[node].children;
      const auto child = std::find_if(children.begin(), children.end(), [&](auto& e) { return e.first == byte; });
      if (child != children.end()) {
        node = child->second;
      } else {
        const auto made = static_cast<uint32_t>(nodes_.size());
        children.emplace_back(byte, made);
        nodes_.emplace_back();
        node = made;
      }
    }
    nodes_[node].token = index;
    longest_ = std::max(longest_, texts_[index].size());
  }
  for (const auto& [byte, child] : nodes_[0].children) starts_[byte] = true;
  if (nodes_[0].children.size() == 1) only_start_ = nodes_[0].children[0].first;
}

SpecialMatch SpecialTokens::find(std::string_view text, size_t begin, const TokenSet& set) const {
  if (set.empty) return {};
  for (size_t i = begin; i < text.size(); ++i) {
    if (only_start_ >= 0) {
      const void* hit = std::memchr(text.data() + i, only_start_, text.size() - i);
      if (hit == nullptr) break;
      i = static_cast<size_t>(static_cast<const char*>(hit) - text.data());
    } else {
      for (PollEvery<1 << 20> poll; i < text.size() && !starts_[static_cast<uint8_t>(text[i])]; ++i) poll();
      if (i == text.size()) break;
    }
    SpecialMatch match;
    uint32_t node = 0;
    for (size_t j = i; j < text.size(); ++j) {
      const auto& children = nodes_[node].children;
      const auto byte = static_cast<uint8_t>(text[j]);
      const auto child = std::find_if(children.begin(), children.end(), [&](auto& e) { return e.first == byte; });
      if (child == children.end()) break;
      node = child->second;
      const size_t token = nodes_[node].token;
      if (token != kNotFound && set.has[token]) match = {i, j + 1, token};
    }
    if (match.begin != kNotFound) return match;
  }
  return {};
}

SpecialMatch SpecialTokens::widened(const SpecialMatch& match, std::string_view text, size_t done) const {
  SpecialMatch wide = match;
  const auto [left, right] = strips(match.index);
  const auto* const base = reinterpret_cast<const uint8_t*>(text.data());
  const auto* const end = base + text.size();
  const auto white_size = [&](size_t at) -> size_t {
    const Char c = char_at(base + at, end);
    return c.cls & kSpace ? c.size : 0;
  };
  while (right && wide.end < text.size() && white_size(wide.end) > 0) wide.end += white_size(wide.end);
  while (left && wide.begin > done) {
    size_t before = wide.begin - 1;
    while (before > done && wide.begin - before < 4 && (text[before] & 0xC0) == 0x80) --before;
    if (before + white_size(before) != wide.begin) break;
    wide.begin = before;
  }
  return wide;
}

size_t cut(std::string_view text, bool last, size_t part_size, const Splitter& splitter, const SpecialTokens& specials,
           const TokenSet& set, std::vector<Segment>& segments) {
  const auto add_ordinary = [&](size_t begin, size_t end) {
    After after = begin == 0 ? After::kNothing : After::kSpecial;
    for (size_t window = part_size; end - begin > window;) {
      const size_t stable = splitter.stable_prefix(text.substr(begin, window));
      if (stable == 0) {
        window *= 2;
        continue;
      }
      segments.push_back({begin, begin + stable, kNotFound, after});
      after = After::kText;
      begin += stable;
      window = part_size;
    }
    if (begin < end) segments.push_back({begin, end, kNotFound, after});
  };
  // A special token that starts at `decided` or later may have its end, or that of a longer one, in text to come.
  const size_t held = last || specials.longest() == 0 ? 0 : specials.longest() - 1;
  size_t decided = text.size() - std::min(text.size(), held);
  if (!last && specials.strips_left()) {  // white space that such a token may take; all but ASCII could be some
    const auto may_be_white = [](char c) {
      return static_cast<int8_t>(c) < 0 || kClassOf[static_cast<uint8_t>(c)] & kSpace;
    };
    while (decided > 0 && may_be_white(text[decided - 1])) --decided;
  }
  size_t done = 0;
  for (;;) {
    const SpecialMatch found = specials.find(text, done, set);
    if (found.begin == kNotFound || found.begin >= decided) break;
    const SpecialMatch match = specials.widened(found, text, done);
    constexpr size_t kCharacter = 4;  // bytes that tell what a character is
    if (!last && specials.strips(found.index).right && text.size() - match.end < kCharacter) {  // white space may come
      decided = match.begin;
      break;
    }
    add_ordinary(done, match.begin);
    segments.push_back({match.begin, match.end, match.index});
    done = match.end;
  }
  if (last) {
    add_ordinary(done, text.size());
    return text.size();
  }
  if (done >= decided) return done;
  const size_t stable = splitter.stable_prefix(text.substr(done, decided - done));
  add_ordinary(done, done + stable);
  return done + stable;
}

}  // namespace cs336::text
