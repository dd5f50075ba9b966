// Finds any of many phrases in a text in one pass (Aho and Corasick's automaton, as a table).
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/text/huge_pages.h"

namespace cs336::text {

class Phrases {
 public:
  // whole_words: a phrase counts only where it does not go on as a word: no letter, digit, mark or "_" on the other
  // side of an end that is one. Scripts that are written without spaces (Han, kana, Thai, Lao, Burmese, Khmer) know no
  // such ends. Throws std::invalid_argument for an empty phrase, or more than a table of kMostBytes can tell apart.
  Phrases(std::span<const std::string> phrases, bool whole_words);
  static constexpr size_t kMostBytes = size_t{1} << 31;

  struct Found {
    size_t count = 0;  // of occurrences, overlapping ones too
    uint32_t first;    // phrase of the one that ends first
  };
  // Stops at the `most`-th.
  Found find(std::string_view utf8, size_t most) const;

 private:
  struct Phrase {
    uint32_t size;
    bool needs_start, needs_end;  // of a word
  };
  static constexpr uint32_t kNone = UINT32_MAX;
  bool counts(const Phrase& phrase, std::string_view utf8, size_t end) const;

  std::vector<Phrase> phrases_;
  std::array<uint8_t, 256> class_of_{};  // bytes that no phrase has are class 0
  size_t num_classes_ = 1;
  TableVector<uint32_t> next_;       // (states, num_classes)
  std::vector<uint32_t> phrase_of_;  // that ends in a state, or kNone
  std::vector<uint32_t> shorter_;    // the next state, along suffixes, in which a phrase ends; 0 if there is none
};

}  // namespace cs336::text
