// Exact duplicates among lines, by 64-bit hashes: two different lines of n are taken for one with a chance of n^2 /
// 2^65.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/text/huge_pages.h"

namespace cs336::text {

// What has been seen once, and what more often: an open table of hashes, the lowest bit says which.
class LineCounts {
 public:
  // Only lines whose hash is `part` modulo `parts` are counted: the table of one part fits where all do not.
  LineCounts(uint64_t part, uint64_t parts) : part_(part), parts_(parts) {}

  // A line ends before "\n", or with the text.
  void add(std::string_view text);
  size_t distinct() const { return used_; }

  // For the lines of a text in order, of this part: drop[i] = 1 for those seen more than once in all.
  void mark_repeated(std::string_view text, uint8_t* drop) const;
  // drop[i] = 1 for those seen before, here or in earlier calls.
  void mark_seen(std::string_view text, uint8_t* drop);

 private:
  bool is_mine(uint64_t hash) const { return parts_ == 1 || (hash >> 32) % parts_ == part_; }
  uint64_t* slot(uint64_t key) const;
  bool insert(uint64_t key);  // whether it is new
  void grow();

  uint64_t part_, parts_;
  TableVector<uint64_t> table_ = TableVector<uint64_t>(1024);
  size_t used_ = 0;
};

size_t count_lines(std::string_view text);
// The lines that are not dropped, with their line ends.
std::string keep_lines(std::string_view text, const uint8_t* drop);

}  // namespace cs336::text
