// How often each distinct piece of text occurs, counted by several threads in memory that grows with the number of
// distinct pieces alone.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string_view>
#include <vector>

#include "cpu/text/pretokenize.h"
#include "cpu/text/special.h"
#include "cpu/text/word.h"

namespace cs336::text {

struct CountedWord {
  std::string_view bytes;
  uint64_t count;
};

class WordCounter {
 public:
  WordCounter(Splitter splitter, std::vector<std::string> specials, size_t num_threads);

  // Counts documents that are whole.
  void add_documents(const std::vector<std::string_view>& documents);
  // Counts the front of a text and returns how much of it that was; the rest belongs at the front of what follows.
  size_t add_front(std::string_view text);

  // By bytes, so that the order does not depend on that of the text.
  std::vector<CountedWord> sorted() const;

 private:
  struct Part {
    std::string_view text;
    Segment segment;
  };
  // One of many tables, so that threads seldom wait for one another.
  struct Shard {
    struct Entry {
      uint64_t hash = 0;
      const char* bytes = nullptr;
      uint64_t size = 0, count = 0;
    };
    std::mutex mutex;
    std::vector<Entry> entries = std::vector<Entry>(64);
    size_t used = 0;
    std::deque<std::vector<char>> arena;  // the bytes; a block never moves
    void add(uint64_t hash, std::string_view word, uint64_t count);
    const char* keep(std::string_view word);
    void grow();
  };
  // A thread's own counts of the words it met last: most words are frequent ones and go no further.
  class Recent;

  void count(const std::vector<Part>& parts);
  void add(uint64_t hash, std::string_view word, uint64_t count);

  static constexpr int kShardBits = 6;
  Splitter splitter_;
  SpecialTokens specials_;
  TokenSet all_specials_;
  size_t num_threads_;
  std::array<Shard, 1 << kShardBits> shards_;
};

}  // namespace cs336::text
