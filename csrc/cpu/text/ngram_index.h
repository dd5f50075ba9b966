// Which text of a set shares an n-gram of words with another text: 64-bit hashes of normalized words (shingles.h).
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "cpu/text/huge_pages.h"

namespace cs336::text {

class NgramIndex {
 public:
  explicit NgramIndex(size_t n) : n_(n) {}

  // The n-grams of a text, under its number. Returns how many there are: 0 for fewer than n words. An n-gram that is
  // there already keeps its first number.
  size_t add(std::string_view utf8, uint32_t item);
  size_t size() const { return used_; }

  struct Match {
    size_t count;   // n-grams of the text that are in the index, repeated ones too
    uint32_t item;  // of the first one
    std::string ngram;
  };
  std::optional<Match> find(std::string_view utf8) const;

 private:
  struct Entry {
    uint64_t hash;  // 0: empty
    uint32_t item;
  };
  Entry* slot(uint64_t hash) const;
  void grow();

  size_t n_, used_ = 0;
  TableVector<Entry> table_ = TableVector<Entry>(1024);
};

}  // namespace cs336::text
