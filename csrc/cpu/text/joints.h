// Where text may be cut that no pattern cuts: between two characters that no token has side by side. No merge goes
// across such a place, so what is before it and what is after it encode as they would together.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "cpu/text/utf8.h"

namespace cs336::text {

// The character that stands for a space in the files of SentencePiece. Text may have it too, and it is a space there.
constexpr uint32_t kSpaceMark = 0x2581;
constexpr std::string_view kSpaceMarkUtf8 = "\xE2\x96\x81";

class Joints {
 public:
  // tokens: those that merges make, with spaces for marks. known: characters that are tokens, where a run of others is
  // one token; empty where each of them is encoded for itself. before_spaces: cut before each space, whatever the
  // tokens.
  Joints(const std::vector<std::string_view>& tokens, std::vector<bool> known, bool before_spaces);

  // As the two functions of this name in pretokenize.h; split takes any capacity from 1 on.
  size_t split(std::string_view text, size_t begin, size_t* ends, size_t capacity) const;
  size_t stable_prefix(std::string_view text) const;

 private:
  static constexpr uint32_t kNoCode = 0x110000;  // of a byte that is not part of valid UTF-8

  static CodePoint char_at(std::string_view text, size_t at);
  bool apart(uint32_t left, uint32_t right) const {
    return (left | right) < 0x80 ? ascii_apart_[left << 7 | right] : apart_anywhere(left, right);
  }
  bool apart_anywhere(uint32_t left, uint32_t right) const;
  bool is_known(uint32_t code) const { return code < known_.size() && known_[code]; }
  size_t place_of(uint32_t left, uint32_t right) const;

  std::array<bool, 128 * 128> ascii_apart_;
  std::vector<bool> together_;  // by a hash of both: some that are apart count as together, which costs a cut
  int shift_;
  std::vector<bool> known_;
  bool before_spaces_;
};

}  // namespace cs336::text
