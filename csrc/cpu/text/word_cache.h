// What words encoded to, in three tables by the size of the word and the number of its ids. All of them start small,
// double as they fill, and are emptied together when one has reached its bound.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "cpu/text/bpe_merge.h"
#include "cpu/text/huge_pages.h"
#include "cpu/text/word.h"

namespace cs336::text {

constexpr size_t kCacheLine = 64;

// The lines of a table, for an offset in bytes.
struct Lines {
  const char* first;
  uint64_t mask;
};

// A hash table of cache lines, found by the lower bits of a hash. What does not fit on its line is on the next.
template <class Entry>
class LineTable {
 public:
  LineTable(size_t lines, size_t max_lines) : entries_(lines * kWays), max_size_(max_lines * kWays) {}

  Lines lines() const { return {reinterpret_cast<const char*>(entries_.data()), mask() / kWays * kCacheLine}; }
  // The entry that is_it(entry), or an empty one. Comes to the front of the line where it was first looked for.
  template <class IsIt>
  const Entry& find(uint64_t hash, IsIt&& is_it) {
    const size_t home = hash * kWays & mask();
    size_t i = home;
    while (!entries_[i].empty() && !is_it(entries_[i])) i = (i + 1) & mask();
    const size_t front = home + i % Entry::kFront;
    if (i - home < Entry::kFront || entries_[i].empty()) return entries_[i];
    std::swap(entries_[i], entries_[front]);  // no place from there to here is empty
    return entries_[front];
  }
  void insert(const Entry& entry) {
    ++used_;
    size_t i = entry.hash_of() * kWays & mask();
    while (!entries_[i].empty()) i = (i + 1) & mask();
    entries_[i] = entry;
  }
  // Grows for `count` more; false if that is beyond the bound. Moves the entries.
  bool reserve(size_t count) {
    while (4 * (used_ + count) > 3 * entries_.size()) {
      if (entries_.size() >= max_size_) return false;
      TableVector<Entry> old(2 * entries_.size());  // may throw: nothing has changed yet
      std::swap(old, entries_);
      used_ = 0;
      for (const Entry& entry : old) {
        if (!entry.empty()) insert(entry);
      }
    }
    return true;
  }
  void widen() { max_size_ = std::max(max_size_, 2 * entries_.size()); }

 private:
  static constexpr size_t kWays = kCacheLine / sizeof(Entry);
  size_t mask() const { return entries_.size() - 1; }

  TableVector<Entry> entries_;
  size_t used_ = 0, max_size_;
};

class WordCache {
 public:
  static constexpr size_t kTinyBytes = 8;
  static constexpr size_t kShortIds = 4;
  static constexpr size_t kLongBytes = 255;

  // Room for `words` more of any kind; false if that is beyond the bounds. Only here do entries move.
  bool reserve(size_t words) {
    if (!tiny_.reserve(words) || !short_.reserve(words) || !long_.reserve(words)) return false;
    if (store_.size() + words * (units(kLongBytes) + kLongBytes) > store_bound_) return false;
    std::fill_n(lines_.begin(), kTinyBytes + 1, tiny_.lines());
    std::fill_n(lines_.begin() + kTinyBytes + 1, kMaxShort - kTinyBytes, short_.lines());
    lines_[kMaxShort + 1] = long_.lines();
    return true;
  }
  // Bounds that leave room for as much again as is here.
  void widen() {
    tiny_.widen();
    short_.widen();
    long_.widen();
    store_bound_ = kStoreUnits + 2 * store_.size();
  }

  // What a word is looked up by: its bytes and size if it has at most kMaxShort, else its hash and kMaxShort + 1.
  static ShortWord key_of(const char* word, size_t size, const char* limit) {
    if (size <= kMaxShort) [[likely]]
      return pack_word(word, size, limit);
    return {size <= kLongBytes ? hash_bytes({word, size}) : 0, uint64_t{kMaxShort + 1} << 56};
  }
  static size_t size_of(const ShortWord& key) { return key.hi >> 56; }
  // The line that a word is first looked for on. It is chosen without a branch, which the processor could not guess.
  const void* line_of(const ShortWord& key, size_t size) const {
    const Lines& lines = lines_[std::min(size, kMaxShort + 1)];
    return lines.first + (hash_of(key, size) * kCacheLine & lines.mask);
  }

  // The ids of a word of at most kTinyBytes, or else of kMaxShort, if they are at the front of its line; find for any.
  // They write them and return how many there are, zero if the word is not here. There is room for kShortIds.
  template <class Id>
  static size_t find_tiny(const void* line, const ShortWord& key, Id* out) {
    const auto* entry = static_cast<const Tiny*>(line);
    entry += (entry[1].bytes == key.lo) + 2 * (entry[2].bytes == key.lo);
    out[0] = static_cast<Id>(entry->size_and_id & kMaxId);
    out[1] = static_cast<Id>(entry->second);
    return entry->is(key) ? 1 + (entry->second != kNoId) : 0;
  }
  template <class Id>
  static size_t find_short(const void* line, const ShortWord& key, Id* out) {
    const auto* entry = static_cast<const Short*>(line);
    entry += entry[1].word == key;
    std::copy_n(entry->ids, kShortIds, out);
    const size_t count = 1 + (entry->ids[1] != kNoId) + (entry->ids[2] != kNoId) + (entry->ids[3] != kNoId);
    return entry->word == key ? count : 0;
  }
  template <class Id>
  size_t find(std::string_view word, const ShortWord& key, Id* out) {
    const uint64_t hash = hash_of(key, word.size());
    const ShortWord stored{key.lo, key.hi | kStored};
    if (word.size() <= kTinyBytes) {
      const Tiny& entry = tiny_.find(hash, [&](const Tiny& e) { return e.is(key) || e.is(stored); });
      if (entry.empty()) return 0;
      const uint32_t first = entry.size_and_id & kMaxId;
      if (entry.is(stored)) return restore(entry.second, first, out);
      out[0] = static_cast<Id>(first);
      out[1] = static_cast<Id>(entry.second);
      return 1 + (entry.second != kNoId);
    }
    if (word.size() <= kMaxShort) {
      const Short& entry = short_.find(hash, [&](const Short& e) { return e.word == key || e.word == stored; });
      if (entry.empty()) return 0;
      if (entry.word == stored) return restore(entry.ids[1], entry.ids[0], out);
      std::copy_n(entry.ids, kShortIds, out);
      return static_cast<size_t>(std::find(entry.ids, entry.ids + kShortIds, kNoId) - entry.ids);
    }
    const Long& entry = long_.find(hash, [&](const Long& e) {
      return e.hash == hash && e.size == word.size() && !std::memcmp(&store_[e.offset], word.data(), e.size);
    });
    return restore(entry.offset + units(entry.size), entry.count, out);
  }

  // Keeps a word that is not here yet.
  void put(std::string_view word, const ShortWord& key, const uint32_t* ids, size_t count) {
    const auto id = [&](size_t i) { return i < count ? ids[i] : kNoId; };
    const auto size = static_cast<uint32_t>(word.size()), number = static_cast<uint32_t>(count);
    if (size <= kTinyBytes) {
      if (count <= 2) {
        tiny_.insert({key.lo, size << 24 | ids[0], id(1)});
      } else {
        tiny_.insert({key.lo, static_cast<uint32_t>(kStored >> 32) | size << 24 | number, store(ids, count)});
      }
      return;
    }
    if (size <= kMaxShort) {
      if (count <= kShortIds) {
        short_.insert({key, {ids[0], id(1), id(2), id(3)}});
      } else {
        short_.insert({{key.lo, key.hi | kStored}, {number, store(ids, count), 0, 0}});
      }
      return;
    }
    const size_t offset = store_.size();
    store_.resize(offset + units(size));
    std::memcpy(&store_[offset], word.data(), size);
    store(ids, count);
    long_.insert({key.lo, static_cast<uint32_t>(offset), static_cast<uint16_t>(size), static_cast<uint16_t>(count)});
  }

 private:
  // Added to the size of a word whose ids do not fit: it has their number for the first, and for the second where in
  // the store they are. Such a word is found by `find` alone.
  static constexpr uint64_t kStored = uint64_t{1} << 63;

  static uint64_t hash_of(const ShortWord& key, size_t size) { return size <= kMaxShort ? hash_word(key) : key.lo; }
  uint32_t store(const uint32_t* ids, size_t count) {
    store_.insert(store_.end(), ids, ids + count);
    return static_cast<uint32_t>(store_.size() - count);
  }
  template <class Id>
  size_t restore(size_t offset, size_t count, Id* out) const {
    std::copy_n(store_.data() + offset, count, out);
    return count;
  }

  struct Tiny {                          // up to two ids
    static constexpr size_t kFront = 3;  // entries of a line that are looked at first
    uint64_t bytes;
    uint32_t size_and_id;
    uint32_t second;  // kNoId if there is none
    bool empty() const { return size_and_id == 0; }
    uint64_t hash_of() const { return hash_word({bytes, (uint64_t{size_and_id >> 24} << 56) & ~kStored}); }
    bool is(const ShortWord& word) const { return bytes == word.lo && size_and_id >> 24 == word.hi >> 56; }
  };
  struct Short {
    static constexpr size_t kFront = 2;
    ShortWord word;
    uint32_t ids[kShortIds];  // kNoId after the last
    bool empty() const { return word.hi == 0; }
    uint64_t hash_of() const { return hash_word({word.lo, word.hi & ~kStored}); }
  };
  struct Long {
    static constexpr size_t kFront = 4;
    uint64_t hash;
    uint32_t offset;  // in the store: the bytes, then the ids
    uint16_t size, count;
    bool empty() const { return size == 0; }
    uint64_t hash_of() const { return hash; }
  };

  static constexpr size_t units(size_t bytes) { return (bytes + 3) / 4; }
  static constexpr size_t kStoreUnits = (8 << 20) / sizeof(uint32_t);

  LineTable<Tiny> tiny_{256, 1 << 16};    // at most 4 MB
  LineTable<Short> short_{256, 1 << 17};  // at most 8 MB
  LineTable<Long> long_{256, 1 << 15};    // at most 2 MB
  std::vector<uint32_t> store_;           // at most 8 MB
  size_t store_bound_ = kStoreUnits;
  std::array<Lines, kMaxShort + 2> lines_{};  // by the size of a word
};

}  // namespace cs336::text
