// Special tokens in text, and where a text may be cut so that its parts encode as the whole does.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/text/pretokenize.h"

namespace cs336::text {

constexpr size_t kNotFound = static_cast<size_t>(-1);

// A subset of the special tokens: one flag each, in their order.
struct TokenSet {
  std::vector<bool> has;
  bool empty = true;
};

struct SpecialMatch {
  size_t begin = kNotFound, end = kNotFound, index = 0;
};

// Whether a special token takes the white space before it, and after it, with it.
struct Strips {
  bool left = false, right = false;
};

class SpecialTokens {
 public:
  // strips: of each token, or none.
  explicit SpecialTokens(std::vector<std::string> texts, std::vector<Strips> strips = {});

  // The first occurrence at or after `begin` of a token of `set`; of several that start there, the longest.
  SpecialMatch find(std::string_view text, size_t begin, const TokenSet& set) const;

  // A match with the white space that goes with it, of what is at `done` or later.
  SpecialMatch widened(const SpecialMatch& match, std::string_view text, size_t done) const;
  Strips strips(size_t index) const { return strips_.empty() ? Strips{} : strips_[index]; }
  bool strips_left() const { return strips_left_; }

  const std::vector<std::string>& texts() const { return texts_; }
  size_t longest() const { return longest_; }

 private:
  struct Node {  // of a trie
    std::vector<std::pair<uint8_t, uint32_t>> children;
    size_t token = kNotFound;
  };
  std::vector<std::string> texts_;
  std::vector<Strips> strips_;
  std::vector<Node> nodes_;
  std::array<bool, 256> starts_{};
  int only_start_ = -1;  // the first byte, if all tokens share it
  size_t longest_ = 0;
  bool strips_left_ = false;  // some token does
};

// What is before a segment: more ordinary text, a special token, or nothing.
enum class After : uint8_t { kText, kSpecial, kNothing };

struct Segment {
  size_t begin, end;
  size_t special;  // which special token this is, or kNotFound: ordinary text
  After after = After::kText;
};

// Cuts text into segments: special tokens of `set`, and ordinary text in parts of about `part_size` bytes that no piece
// goes across. Returns the end of the last segment: what is after it depends on text yet to come, and belongs at the
// front of it. With `last` nothing is to come, and the segments cover the text.
size_t cut(std::string_view text, bool last, size_t part_size, const Splitter& splitter, const SpecialTokens& specials,
           const TokenSet& set, std::vector<Segment>& segments);

}  // namespace cs336::text
