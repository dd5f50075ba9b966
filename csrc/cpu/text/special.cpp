#include "cpu/text/special.h"

#include <algorithm>
#include <cstring>

#include "cpu/text/interrupt.h"

namespace cs336::text {

SpecialTokens::SpecialTokens(std::vector<std::string> texts) : texts_(std::move(texts)), nodes_(1) {
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

size_t cut(std::string_view text, bool last, size_t part_size, const Splitter& splitter, const SpecialTokens& specials,
           const TokenSet& set, std::vector<Segment>& segments) {
  const auto add_ordinary = [&](size_t begin, size_t end) {
    for (size_t window = part_size; end - begin > window;) {
      const size_t stable = splitter.stable_prefix(text.substr(begin, window));
      if (stable == 0) {
        window *= 2;
        continue;
      }
      segments.push_back({begin, begin + stable, kNotFound});
      begin += stable;
      window = part_size;
    }
    if (begin < end) segments.push_back({begin, end, kNotFound});
  };
  // A special token that starts at `decided` or later may have its end, or that of a longer one, in text to come.
  const size_t held = last || specials.longest() == 0 ? 0 : specials.longest() - 1;
  const size_t decided = text.size() - std::min(text.size(), held);
  size_t done = 0;
  for (;;) {
    const SpecialMatch match = specials.find(text, done, set);
    if (match.begin == kNotFound || match.begin >= decided) break;
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
