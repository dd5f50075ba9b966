// What words encoded to, in a table of fixed size: 4 MB of short words and 1.1 MB of others.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

#include "cpu/text/word.h"

namespace cs336::text {

constexpr uint32_t kNoId = UINT32_MAX;

class WordCache {
 public:
  static constexpr size_t kIds = 4;  // of a short word; more go with the long ones
  static constexpr size_t kLongBytes = 64;
  static constexpr size_t kLongIds = 48;

  struct Short {
    ShortWord word;
    uint32_t ids[kIds];  // kNoId after the last
  };
  struct Long {
    uint64_t hash;
    uint8_t size, count;
    char bytes[kLongBytes];
    uint32_t ids[kLongIds];
  };

  // The set that a word belongs to: two places on one cache line, the newer word first.
  Short* set_of(uint64_t hash) const { return short_.get() + (hash >> (64 - kSetBits)) * 2; }

  static const Short* find(const Short* set, const ShortWord& word) {
    if (set[0].word == word) return set;
    return set[1].word == word ? set + 1 : nullptr;
  }
  static void put(Short* set, const ShortWord& word, const uint32_t* ids, size_t count) {
    set[1] = set[0];
    set[0].word = word;
    for (size_t i = 0; i < kIds; ++i) set[0].ids[i] = i < count ? ids[i] : kNoId;
  }

  const Long* find(uint64_t hash, std::string_view word) const {
    const Long& entry = long_.get()[hash >> (64 - kLongBits)];
    const bool found =
        entry.hash == hash && entry.size == word.size() && !std::memcmp(entry.bytes, word.data(), word.size());
    return found ? &entry : nullptr;
  }
  void put(uint64_t hash, std::string_view word, const uint32_t* ids, size_t count) {
    Long& entry = long_.get()[hash >> (64 - kLongBits)];
    entry.hash = hash;
    entry.size = static_cast<uint8_t>(word.size());
    entry.count = static_cast<uint8_t>(count);
    std::memcpy(entry.bytes, word.data(), word.size());
    std::copy_n(ids, count, entry.ids);
  }

 private:
  static constexpr int kSetBits = 16, kLongBits = 12;

  // Zeroed, on cache lines; pages that no word touches take no memory.
  template <class T>
  class Table {
   public:
    explicit Table(size_t count) : memory_(std::calloc(count * sizeof(T) + kLine, 1)) {
      if (memory_ == nullptr) throw std::bad_alloc();
      entries_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + kLine - 1) / kLine * kLine);
    }
    T* get() const { return entries_; }

   private:
    static constexpr size_t kLine = 64;
    struct Free {
      void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> memory_;
    T* entries_;
  };

  Table<Short> short_{size_t{2} << kSetBits};
  Table<Long> long_{size_t{1} << kLongBits};
};

}  // namespace cs336::text
