#include "cpu/text/word_count.h"

#include <algorithm>
#include <memory>

#include "cpu/text/parallel.h"

namespace cs336::text {
namespace {

constexpr size_t kPartSize = 1 << 20;  // bytes of text that one thread takes at a time
constexpr size_t kArenaBlock = 1 << 18;

}  // namespace

class WordCounter::Recent {
 public:
  explicit Recent(WordCounter& counter) : counter_(counter), entries_(size_t{1} << kBits) {}

  void add_short(const ShortWord& word) {
    Entry& entry = entries_[hash_word(word) >> (64 - kBits)];
    if (entry.word != word) {
      flush(entry);
      entry.word = word;
    }
    ++entry.count;
  }
  void add_long(std::string_view word) { counter_.add(hash_bytes(word), word, 1); }
  void flush() {
    for (Entry& entry : entries_) flush(entry);
  }

 private:
  struct Entry {
    ShortWord word;
    uint64_t count = 0;
  };
  void flush(Entry& entry) {
    if (entry.count == 0) return;
    const char* bytes = reinterpret_cast<const char*>(&entry.word);  // lo and hi lie in the order of the word's bytes
    counter_.add(hash_word(entry.word), {bytes, entry.word.hi >> 56}, entry.count);
    entry.count = 0;
  }
  static constexpr int kBits = 15;
  WordCounter& counter_;
  std::vector<Entry> entries_;
};

void WordCounter::Shard::add(uint64_t hash, std::string_view word, uint64_t count) {
  const size_t mask = entries.size() - 1;
  size_t i = hash & mask;
  for (; entries[i].bytes != nullptr; i = (i + 1) & mask) {
    Entry& entry = entries[i];
    if (entry.hash == hash && std::string_view(entry.bytes, entry.size) == word) {
      entry.count += count;
      return;
    }
  }
  entries[i] = {hash, keep(word), word.size(), count};
  if (++used * 2 > entries.size()) grow();
}

const char* WordCounter::Shard::keep(std::string_view word) {
  if (arena.empty() || arena.back().capacity() - arena.back().size() < word.size()) {
    arena.emplace_back().reserve(std::max(kArenaBlock, word.size()));
  }
  std::vector<char>& block = arena.back();
  block.insert(block.end(), word.begin(), word.end());
  return block.data() + block.size() - word.size();
}

void WordCounter::Shard::grow() {
  std::vector<Entry> larger(entries.size() * 2);
  for (const Entry& entry : entries) {
    if (entry.bytes == nullptr) continue;
    size_t i = entry.hash & (larger.size() - 1);
    while (larger[i].bytes != nullptr) i = (i + 1) & (larger.size() - 1);
    larger[i] = entry;
  }
  entries = std::move(larger);
}

WordCounter::WordCounter(Splitter splitter, std::vector<std::string> specials, size_t num_threads)
    : splitter_(std::move(splitter)), specials_(std::move(specials)), num_threads_(num_threads) {
  all_specials_.has.assign(specials_.texts().size(), true);
  all_specials_.empty = specials_.texts().empty();
}

void WordCounter::add(uint64_t hash, std::string_view word, uint64_t count) {
  Shard& shard = shards_[hash >> (64 - kShardBits)];
  const std::lock_guard lock(shard.mutex);
  shard.add(hash, word, count);
}

void WordCounter::count(const std::vector<Part>& parts) {
  std::vector<std::unique_ptr<Recent>> recent(num_threads_);
  parallel_for(parts.size(), num_threads_, [&](size_t i, size_t worker) {
    if (parts[i].segment.special != kNotFound) return;
    if (!recent[worker]) recent[worker] = std::make_unique<Recent>(*this);
    const auto [begin_of, end_of, special] = parts[i].segment;
    const std::string_view text = parts[i].text.substr(begin_of, end_of - begin_of);
    const char* limit = text.data() + text.size();
    splitter_.for_each_batch(text, [&](size_t begin, const size_t* ends, size_t count) {
      for (size_t k = 0; k < count; begin = ends[k++]) {
        const std::string_view word = text.substr(begin, ends[k] - begin);
        if (word.size() <= kMaxShort) {
          recent[worker]->add_short(pack_word(word.data(), word.size(), limit));
        } else {
          recent[worker]->add_long(word);
        }
      }
    });
  });
  for (auto& r : recent) {
    if (r) r->flush();
  }
}

void WordCounter::add_documents(const std::vector<std::string_view>& documents) {
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

std::vector<CountedWord> WordCounter::sorted() const {
  std::vector<CountedWord> words;
  for (const Shard& shard : shards_) {
    for (const Shard::Entry& entry : shard.entries) {
      if (entry.bytes != nullptr) words.push_back({{entry.bytes, entry.size}, entry.count});
    }
  }
  std::sort(words.begin(), words.end(), [](const auto& a, const auto& b) { return a.bytes < b.bytes; });
  return words;
}

}  // namespace cs336::text
