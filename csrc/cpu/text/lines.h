// Exact duplicates among lines, by 64-bit hashes: two different lines of n are taken for one with a chance of n^2 /
// 2^65.
#pragma once
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "cpu/text/huge_pages.h"

namespace cs336::text {

// What has been seen once, and what more often: an open table of hashes, the lowest bit says which.
class LineTable {
 public:
  // Of a line; never 0.
  static uint64_t key_of(std::string_view line);
  bool insert(uint64_t key);  // whether it is new
  bool is_repeated(uint64_t key) const { return *slot(key) & kRepeated; }
  void prefetch(uint64_t key) const { __builtin_prefetch(&table_[key >> 2 & (table_.size() - 1)]); }

 private:
  static constexpr uint64_t kRepeated = 1, kKey = ~kRepeated;  // an empty place is 0
  uint64_t* slot(uint64_t key) const;
  void grow();

  TableVector<uint64_t> table_ = TableVector<uint64_t>(1024);
  size_t used_ = 0;
};

// A line ends before "\n", or with the text. Texts are worked on in chunks, one a thread: lines are hashed, then each
// thread asks its own table, which has the hashes that fall to it, then the lines that stay are gathered.
class LineDedup {
 public:
  // Only lines whose hash is `part` modulo `parts` are looked at: the tables of one part fit where all do not.
  LineDedup(uint64_t part, uint64_t parts, size_t num_threads) : part_(part), parts_(parts), tables_(num_threads) {}

  void count(std::string_view text) { work(text, Pass::kCount, nullptr, nullptr); }

  struct Report {
    uint64_t lines = 0, dropped = 0;
  };
  using Write = std::function<void(std::string_view)>;
  // Which lines of a text go: those that were counted more than once, or with `first` those that were there before, in
  // this text or an earlier one. drop: a flag a line, which other parts may have set, or null. write, if there is one,
  // gets the lines that stay, in order and with their ends.
  Report drop_repeated(std::string_view text, bool first, uint8_t* drop, const Write& write) {
    return work(text, first ? Pass::kFirst : Pass::kRepeated, drop, write);
  }

 private:
  enum class Pass { kCount, kRepeated, kFirst };
  struct Keyed {
    uint64_t key;
    size_t line;
  };
  struct Chunk {
    std::string_view text;
    Buffer<size_t> ends;                   // of lines, their "\n" included
    std::vector<std::vector<Keyed>> keys;  // for each table
    std::vector<uint8_t> drop;
    Buffer<char> kept;
  };
  Report work(std::string_view text, Pass pass, uint8_t* drop, const Write& write);
  void hash(Chunk& chunk) const;
  static void ask(LineTable& table, const std::vector<Keyed>& keys, Pass pass, uint8_t* drop);
  static void gather(Chunk& chunk);

  uint64_t part_, parts_;
  std::vector<LineTable> tables_;
};

size_t count_lines(std::string_view text);

}  // namespace cs336::text
