#include "cpu/text/word_count.h"

#include <algorithm>
#include <memory>

#include "cpu/text/parallel.h"

namespace cs336::text {
namespace {

constexpr size_t kPartSize = 1 << 18;  // bytes of text that one thread takes at a time
constexpr size_t kArenaBlock = 1 << 14;

}  // namespace

// A thread's own counts of the words it met last: most words are frequent ones and go no further. The others wait until
// there are enough of one shard to be worth its lock.
class WordCounter::Recent {
 public:
  explicit Recent(WordCounter& counter) : counter_(counter), entries_(kMask + 1) {
    for (auto& waiting : shorts_) waiting.reserve(kBatch);
    for (auto& waiting : longs_) waiting.reserve(kBatch);
  }

  void add(const ShortWord& word) {
    const uint64_t hash = hash_word(word);
    Short& entry = entries_[hash & kMask];
    if (entry.word != word) {
      if (entry.count != 0) send(shorts_, hash, entry);  // to the shard that both belong to
      entry = {word, 0};
    }
    ++entry.count;
  }

  void add(std::string_view word) {
    const uint64_t hash = hash_bytes(word);
    send(longs_, hash, {hash, word.data(), word.size(), 1});
  }

  void flush() {
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (entries_[i].count != 0) send(shorts_, i, std::exchange(entries_[i], {}));
    }
    for (size_t shard = 0; shard < counter_.shards_.size(); ++shard) {
      counter_.shards_[shard].add(shorts_[shard]);
      counter_.shards_[shard].add(longs_[shard]);
    }
  }

 private:
  template <class Word>
  using Waiting = std::array<std::vector<Word>, size_t{1} << kShardBits>;

  template <class Word>
  void send(Waiting<Word>& waiting, uint64_t hash, const Word& word) {
    const size_t shard = hash & ((1 << kShardBits) - 1);
    waiting[shard].push_back(word);
    if (waiting[shard].size() == kBatch) counter_.shards_[shard].add(waiting[shard]);
  }

  static constexpr size_t kMask = (1 << 13) - 1;
  static constexpr size_t kBatch = 64;
  WordCounter& counter_;
  std::vector<Short> entries_;
  Waiting<Short> shorts_;
  Waiting<Long> longs_;
};

template <class Word>
void WordCounter::Shard::add(std::vector<Word>& words) {
  const std::lock_guard lock(mutex);
  Table<Word>& table = std::get<Table<Word>>(tables);
  for (const Word& word : words) __builtin_prefetch(&table.entries[table.home_of(word)]);
  for (const Word& word : words) {
    Word& entry = table.find(word);
    if (entry.count != 0) {
      entry.count += word.count;
      continue;
    }
    entry = word;
    if constexpr (std::is_same_v<Word, Long>) entry.data = keep(word.bytes());
    table.grow();
  }
  words.clear();
}

const char* WordCounter::Shard::keep(std::string_view word) {
  if (arena.empty() || arena.back().capacity() - arena.back().size() < word.size()) {
    arena.emplace_back().reserve(std::max(kArenaBlock, word.size()));
  }
  std::vector<char>& block = arena.back();
  block.insert(block.end(), word.begin(), word.end());
  return block.data() + block.size() - word.size();
}

WordCounter::WordCounter(Splitter splitter, std::vector<std::string> specials, size_t num_threads)
    : splitter_(std::move(splitter)), specials_(std::move(specials)), num_threads_(num_threads) {
  all_specials_.has.assign(specials_.texts().size(), true);
  all_specials_.empty = specials_.texts().empty();
}

void WordCounter::count(const std::vector<Part>& parts) {
  std::vector<std::unique_ptr<Recent>> recent(num_threads_);
  parallel_for(parts.size(), num_threads_, [&](size_t i, size_t worker) {
    if (parts[i].segment.special != kNotFound) return;
    if (!recent[worker]) recent[worker] = std::make_unique<Recent>(*this);
    Recent& counts = *recent[worker];
    const Segment& segment = parts[i].segment;
    const std::string_view text = parts[i].text.substr(segment.begin, segment.end - segment.begin);
    const char* limit = text.data() + text.size();
    splitter_.for_each_batch(text, [&](size_t begin, const size_t* ends, size_t count) {
      for (size_t k = 0; k < count; begin = ends[k++]) {
        const size_t size = ends[k] - begin;
        if (size <= kMaxShort) {
          counts.add(pack_word(text.data() + begin, size, limit));
        } else {
          counts.add(text.substr(begin, size));
        }
      }
    });
  });
  parallel_for(num_threads_, num_threads_, [&](size_t i, size_t) {
    if (recent[i]) recent[i]->flush();
  });
}

void WordCounter::add_documents(std::span<const std::string_view> documents) {
  std::vector<Part> parts;
  std::vector<Segment> segments;
  for (const std::string_view document : documents) {
    segments.clear();
    cut(document, true, kPartSize, splitter_, specials_, all_specials_, segments);
    for (const Segment& segment : segments) parts.push_back({document, segment});
  }
  count(parts);
}

size_t WordCounter::add_front(std::string_view text) {
  std::vector<Segment> segments;
  const size_t done = cut(text, false, kPartSize, splitter_, specials_, all_specials_, segments);
  std::vector<Part> parts;
  for (const Segment& segment : segments) parts.push_back({text, segment});
  count(parts);
  return done;
}

std::vector<CountedWord> WordCounter::words() const {
  std::vector<CountedWord> words;
  for (const Shard& shard : shards_) {
    for (const Short& entry : std::get<Table<Short>>(shard.tables).entries) {
      if (entry.count != 0) words.push_back({entry.bytes(), entry.count});
    }
    for (const Long& entry : std::get<Table<Long>>(shard.tables).entries) {
      if (entry.count != 0) words.push_back({entry.bytes(), entry.count});
    }
  }
  return words;
}

void WordCounter::clear() { shards_ = std::vector<Shard>(shards_.size()); }

}  // namespace cs336::text
