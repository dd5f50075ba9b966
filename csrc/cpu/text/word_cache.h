// What words encoded to, in three tables by the size of the word and the number of its ids. All of them start small,
// double as they fill, and are emptied together when one has reached its bound.
#pragma once
#include <sys/mman.h>
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>
#include <vector>

#include "cpu/text/word.h"

namespace cs336::text {

constexpr uint32_t kNoId = UINT32_MAX;
constexpr uint32_t kMaxId = (1 << 24) - 1;
constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = 2 << 20;

// The lines of a table, for an offset in bytes.
struct Lines {
  const char* first;
  uint64_t mask;
};

// A hash table of cache lines, found by the lower bits of a hash. What does not fit on its line is on the next.
template <class Entry>
class LineTable {
 public:
  LineTable(size_t lines, size_t max_lines)
      : entries_(zeroed(lines * kWays)), mask_(lines * kWays - 1), max_size_(max_lines * kWays) {}

  Lines lines() const { return {reinterpret_cast<const char*>(entries_.get()), mask_ / kWays * kCacheLine}; }
  // The entry that is_it(entry), or the empty one where it would be.
  template <class IsIt>
  const Entry* find(uint64_t hash, IsIt&& is_it) const {
    const Entry* entry = entries_.get() + (hash * kWays & mask_);
    while (!entry->empty() && !is_it(*entry)) entry = &entries_[(entry - entries_.get() + 1) & mask_];
    return entry;
  }
  void insert(const Entry& entry) {
    ++used_;
    const Entry* const place = find(entry.hash_of(), [](const Entry&) { return false; });
    entries_[place - entries_.get()] = entry;
  }
  // Grows for `count` more; false if that is beyond the bound. Moves the entries.
  bool reserve(size_t count) {
    while (2 * (used_ + count) > size()) {
      if (size() == max_size_) return false;
      const size_t old_size = size();
      Entries old = zeroed(2 * old_size);  // may throw: nothing has changed yet
      std::swap(old, entries_);
      mask_ = 2 * old_size - 1;
      used_ = 0;
      for (size_t i = 0; i < old_size; ++i) {
        if (!old[i].empty()) insert(old[i]);
      }
    }
    return true;
  }
  void clear() {
    std::memset(static_cast<void*>(entries_.get()), 0, size() * sizeof(Entry));
    used_ = 0;
  }

 private:
  static constexpr size_t kWays = kCacheLine / sizeof(Entry);
  struct Free {
    void operator()(Entry* p) const { std::free(p); }
  };
  using Entries = std::unique_ptr<Entry[], Free>;

  size_t size() const { return mask_ + 1; }
  static Entries zeroed(size_t size) {
    const size_t bytes = size * sizeof(Entry);
    void* memory = std::aligned_alloc(std::min(bytes, kHugePage), bytes);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (bytes >= kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    std::memset(memory, 0, bytes);
    return Entries(static_cast<Entry*>(memory));
  }

  Entries entries_;
  size_t mask_, used_ = 0, max_size_;
};

class WordCache {
 public:
  static constexpr size_t kTinyBytes = 8;
  static constexpr size_t kShortIds = 4;
  static constexpr size_t kLongBytes = 255;

  // Room for `words` more of any kind. Only here do entries move.
  void reserve(size_t words) {
    if (tiny_.reserve(words) && short_.reserve(words) && long_.reserve(words) &&
        store_.size() + words * (units(kLongBytes) + kLongBytes) <= kStoreUnits) {
      lines_ = {tiny_.lines(), short_.lines(), long_.lines()};
      return;
    }
    tiny_.clear();
    short_.clear();
    long_.clear();
    store_.clear();
    reserve(words);
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
  void put(const ShortWord& word, uint64_t hash, const uint32_t* ids, size_t count) {
    const size_t size = word.hi >> 56;
    const auto id = [&](size_t i) { return i < count ? ids[i] : kNoId; };
    if (size <= kTinyBytes) {
      const bool fits = count <= 2;
      tiny_.insert({word.lo, static_cast<uint32_t>(size << 24 | (fits ? ids[0] : 0)), fits ? id(1) : kElsewhere});
      if (fits) return;
    }
    const bool fits = count <= kShortIds;
    short_.insert({word, {fits ? ids[0] : kElsewhere, id(1), id(2), id(3)}});
    if (!fits) put(bytes_of(word), hash, ids, count);
  }
  void put(std::string_view word, uint64_t hash, const uint32_t* ids, size_t count) {
    const size_t offset = store_.size();
    store_.resize(offset + units(word.size()));
    std::memcpy(&store_[offset], word.data(), word.size());
    store_.insert(store_.end(), ids, ids + count);
    long_.insert(
        {hash, static_cast<uint32_t>(offset), static_cast<uint16_t>(word.size()), static_cast<uint16_t>(count)});
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
  // lo and hi lie in the order of the bytes.
  static std::string_view bytes_of(const ShortWord& word) {
    return {reinterpret_cast<const char*>(&word), static_cast<size_t>(word.hi >> 56)};
  }

  LineTable<Tiny> tiny_{256, 1 << 16};    // at most 4 MB
  LineTable<Short> short_{256, 1 << 17};  // at most 8 MB
  LineTable<Long> long_{256, 1 << 15};    // at most 2 MB
  std::vector<uint32_t> store_;           // at most 8 MB
  std::array<Lines, 3> lines_{};
};

}  // namespace cs336::text
