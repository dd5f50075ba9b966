// How often each distinct piece of text occurs, counted by several threads in memory that grows with the number of
// distinct pieces alone.
#pragma once
#include <cstdint>
#include <deque>
#include <mutex>
#include <span>
#include <string_view>
#include <tuple>
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
  void add_documents(std::span<const std::string_view> documents);
  // Counts the front of a text and returns how much of it that was; the rest belongs at the front of what follows.
  size_t add_front(std::string_view text);

  // In no order. The bytes are the counter's own.
  std::vector<CountedWord> words() const;
  // Forgets all words.
  void clear();
  size_t num_threads() const { return num_threads_; }

 private:
  static constexpr int kShardBits = 6;
  struct Part {
    std::string_view text;
    Segment segment;
  };
  // Of a table; an empty place has no count.
  struct Short {
    ShortWord word;
    uint64_t count = 0;
    uint64_t hash() const { return hash_word(word); }
    std::string_view bytes() const { return {reinterpret_cast<const char*>(&word), word.hi >> 56}; }
    bool same(const Short& other) const { return word == other.word; }
  };
  struct Long {
    uint64_t hashed = 0;
    const char* data = nullptr;
    uint64_t size = 0, count = 0;
    uint64_t hash() const { return hashed; }
    std::string_view bytes() const { return {data, size}; }
    bool same(const Long& other) const { return hashed == other.hashed && bytes() == other.bytes(); }
  };
  template <class Word>
  struct Table {
    std::vector<Word> entries = std::vector<Word>(16);
    size_t used = 0;
    // Where a word is first looked for: by bits that do not choose the shard. The upper bits of a hash are no good.
    size_t home_of(const Word& word) const { return word.hash() >> kShardBits & (entries.size() - 1); }
    // The place of a word, or an empty one for it.
    Word& find(const Word& word) {
      size_t i = home_of(word);
      while (entries[i].count != 0 && !entries[i].same(word)) i = (i + 1) & (entries.size() - 1);
      return entries[i];
    }
    // After a word was put into an empty place.
    void grow() {
      if (++used * 4 <= entries.size() * 3) return;
      std::vector<Word> old(entries.size() * 2);
      old.swap(entries);
      for (const Word& word : old) {
        if (word.count != 0) find(word) = word;
      }
    }
  };
  // One of many, so that threads seldom wait for one another, and each is small enough for a core's cache.
  struct Shard {
    std::mutex mutex;
    std::tuple<Table<Short>, Table<Long>> tables;
    std::deque<std::vector<char>> arena;  // the bytes of long words; a block never moves
    template <class Word>
    void add(std::vector<Word>& words);
    const char* keep(std::string_view word);
  };
  class Recent;

  void count(const std::vector<Part>& parts);

  Splitter splitter_;
  SpecialTokens specials_;
  TokenSet all_specials_;
  size_t num_threads_;
  std::vector<Shard> shards_{size_t{1} << kShardBits};
};

}  // namespace cs336::text
