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
  // The entry that is_it(entry), or the empty one where it would be.
  template <class IsIt>
  const Entry* find(uint64_t hash, IsIt&& is_it) const {
    size_t i = hash * kWays & mask();
    while (!entries_[i].empty() && !is_it(entries_[i])) i = (i + 1) & mask();
    return &entries_[i];
  }
  void insert(const Entry& entry) {
    ++used_;
    const Entry* const place = find(entry.hash_of(), [](const Entry&) { return false; });
    entries_[place - entries_.data()] = entry;
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
    lines_ = {tiny_.lines(), short_.lines(), long_.lines()};
    return true;
  }
  // Bounds that leave room for as much again as is here.
  void widen() {
    tiny_.widen();
    short_.widen();
    long_.widen();
    store_bound_ += store_.size();
  }

  // The line that a word of `size` bytes is first looked for on. No branch: the processor could not guess it.
  const void* line_of(uint64_t hash, size_t size) const {
    const Lines& lines = lines_[(size > kTinyBytes) + (size > kMaxShort)];
    return lines.first + (hash * kCacheLine & lines.mask);
  }

  // The ids of a word of at most kTinyBytes, or else of kMaxShort, if it is where it is first looked for; find for any.
  // They write them and return how many there are, zero if the word is not here. There is room for kShortIds.
  static size_t find_tiny(const void* line, const ShortWord& word, uint32_t* out) {
    const auto* entry = static_cast<const Tiny*>(line);
    entry = entry[2].bytes == word.lo ? entry + 2 : entry[1].bytes == word.lo ? entry + 1 : entry;
    out[0] = entry->size_and_id & kMaxId;
    out[1] = entry->second;
    return entry->is(word) && entry->second != kElsewhere ? 1 + (entry->second != kNoId) : 0;
  }
  static size_t find_short(const void* line, const ShortWord& word, uint32_t* out) {
    const auto* entry = static_cast<const Short*>(line);
    entry += entry[1].word == word;
    std::memcpy(out, entry->ids, sizeof(entry->ids));
    const size_t count = 1 + (entry->ids[1] != kNoId) + (entry->ids[2] != kNoId) + (entry->ids[3] != kNoId);
    return entry->word == word && entry->ids[0] != kElsewhere ? count : 0;
  }
  size_t find(std::string_view word, const ShortWord& packed, uint64_t hash, uint32_t* out) const {
    if (word.size() <= kTinyBytes) {
      const Tiny* entry = tiny_.find(hash, [&](const Tiny& e) { return e.is(packed); });
      if (entry->second != kElsewhere) {
        out[0] = entry->size_and_id & kMaxId;
        out[1] = entry->second;
        return entry->empty() ? 0 : 1 + (entry->second != kNoId);
      }
    }
    if (word.size() <= kMaxShort) {
      const Short* entry = short_.find(hash, [&](const Short& e) { return e.word == packed; });
      if (entry->ids[0] != kElsewhere) {
        std::memcpy(out, entry->ids, sizeof(entry->ids));
        const auto* end = std::find(entry->ids, entry->ids + kShortIds, kNoId);
        return entry->empty() ? 0 : static_cast<size_t>(end - entry->ids);
      }
    }
    const Long* entry = long_.find(hash, [&](const Long& e) {
      return e.hash == hash && e.size == word.size() && !std::memcmp(&store_[e.offset], word.data(), e.size);
    });
    std::copy_n(store_.data() + entry->offset + units(entry->size), entry->count, out);
    return entry->count;
  }

  // Keeps a word that is not here yet.
  void put(std::string_view word, const ShortWord& packed, uint64_t hash, const uint32_t* ids, size_t count) {
    const auto id = [&](size_t i) { return i < count ? ids[i] : kNoId; };
    const auto size = static_cast<uint32_t>(word.size());
    if (size <= kTinyBytes) {
      const bool fits = count <= 2;
      tiny_.insert({packed.lo, size << 24 | (fits ? ids[0] : 0), fits ? id(1) : kElsewhere});
      if (fits) return;
    }
    if (size <= kMaxShort) {
      const bool fits = count <= kShortIds;
      short_.insert({packed, {fits ? ids[0] : kElsewhere, id(1), id(2), id(3)}});
      if (fits) return;
    }
    const size_t offset = store_.size();
    store_.resize(offset + units(size));
    std::memcpy(&store_[offset], word.data(), size);
    store_.insert(store_.end(), ids, ids + count);
    long_.insert({hash, static_cast<uint32_t>(offset), static_cast<uint16_t>(size), static_cast<uint16_t>(count)});
  }

 private:
  static constexpr uint32_t kElsewhere = kNoId - 1;  // for a word with more ids than fit: see the next table

  struct Tiny {  // up to two ids
    uint64_t bytes;
    uint32_t size_and_id;
    uint32_t second;  // kNoId if there is none
    bool empty() const { return size_and_id == 0; }
    uint64_t hash_of() const { return hash_word({bytes, uint64_t{size_and_id >> 24} << 56}); }
    bool is(const ShortWord& word) const { return bytes == word.lo && size_and_id >> 24 == word.hi >> 56; }
  };
  struct Short {
    ShortWord word;
    uint32_t ids[kShortIds];  // kNoId after the last
    bool empty() const { return word.hi == 0; }
    uint64_t hash_of() const { return hash_word(word); }
  };
  struct Long {
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
  std::array<Lines, 3> lines_{};
};

}  // namespace cs336::text
