#include "cpu/text/repeats.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "cpu/text/hash.h"
#include "cpu/text/huge_pages.h"
#include "cpu/text/interrupt.h"
#include "cpu/text/parallel.h"

namespace cs336::text {
namespace {

constexpr size_t kBatch = 1 << 12;               // windows that are hashed before the table is asked
constexpr size_t kAhead = 16;                    // of them whose places are fetched ahead
constexpr size_t kFewWindows = 1 << 16;          // that are not worth a second thread
constexpr size_t kFewestOfPart = 16;             // windows
constexpr uint64_t kBase = 0xD1342543DE82EF95u;  // odd: a power of it loses no bit of a symbol

uint64_t scaled(uint64_t hash, uint64_t count) {  // to 0 .. count - 1
  return static_cast<uint64_t>(static_cast<unsigned __int128>(hash) * count >> 64);
}

// The hash of a window that moves on by a symbol: sum_k value(s_k) kBase^(length - 1 - k) mod 2^64, mixed.
template <class Symbol>
class Rolling {
 public:
  explicit Rolling(size_t length) : length_(length) {
    for (size_t i = 0; i < length; ++i) power_ *= kBase;
  }
  void start(const Symbol* window) {
    state_ = 0;
    for (size_t i = 0; i < length_; ++i) state_ = state_ * kBase + hash_number(window[i]);
  }
  // From the window that begins at `gone`.
  void roll(const Symbol* gone) {
    state_ = state_ * kBase + (hash_number(gone[length_]) - hash_number(*gone) * power_);
  }
  uint64_t hash() const { return hash_number(state_); }

 private:
  size_t length_;
  uint64_t power_ = 1, state_ = 0;
};

// Where each distinct window was first. The hash's high bits are the place, bits 24 to 31 choose the part, the low ones
// are kept with the position: few windows that differ are compared.
template <class Symbol>
class FirstPlaces {
 public:
  // expected: windows; more of them move the table to a larger one.
  FirstPlaces(std::span<const Symbol> corpus, size_t length, size_t expected)
      : corpus_(corpus), length_(length), table_(places_for(expected)) {}

  static size_t places_for(size_t windows) { return windows + windows / 4 + 8; }

  void prefetch(uint64_t hash) const { __builtin_prefetch(&table_[scaled(hash, table_.size())]); }

  // The first place of the window at `at`, which is `at` where it is new.
  size_t first(uint64_t hash, size_t at) {
    size_t place = scaled(hash, table_.size());
    for (; table_[place] != 0; place = next(place)) {
      const uint64_t entry = table_[place];
      if ((entry & kTag) == (hash & kTag) && equal((entry >> kTagBits) - 1, at)) return (entry >> kTagBits) - 1;
    }
    table_[place] = (at + 1) << kTagBits | (hash & kTag);
    if (places_for(++used_) > table_.size()) grow();
    return at;
  }

  static constexpr int kTagBits = 24;
  static constexpr uint64_t kMostSymbols = uint64_t{1} << (64 - kTagBits);

 private:
  static constexpr uint64_t kTag = (uint64_t{1} << kTagBits) - 1;

  size_t next(size_t place) const { return place + 1 == table_.size() ? 0 : place + 1; }
  bool equal(size_t a, size_t b) const { return std::memcmp(&corpus_[a], &corpus_[b], length_ * sizeof(Symbol)) == 0; }
  // Hashes are not kept: they are made again from the windows.
  void grow() {
    TableVector<uint64_t> old(places_for(2 * used_));
    old.swap(table_);
    Rolling<Symbol> rolling(length_);
    for (const uint64_t entry : old) {
      if (entry == 0) continue;
      rolling.start(&corpus_[(entry >> kTagBits) - 1]);
      size_t place = scaled(rolling.hash(), table_.size());
      while (table_[place] != 0) place = next(place);
      table_[place] = entry;
    }
  }

  std::span<const Symbol> corpus_;
  size_t length_;
  TableVector<uint64_t> table_;  // first position + 1 and tag; 0: empty
  size_t used_ = 0;
};

// One bit a symbol: whether a repeated window begins there. Parts set bits at the same time.
class Marks {
 public:
  explicit Marks(size_t size) : words_(size / 64 + 1) {}
  void set(size_t at) {
    std::atomic_ref(words_[at / 64]).fetch_or(uint64_t{1} << (at % 64), std::memory_order_relaxed);
  }
  // The first mark in begin .. end - 1, or end.
  size_t next(size_t begin, size_t end) const {
    if (begin >= end) return end;
    size_t word = begin / 64;
    uint64_t left = words_[word] & (~uint64_t{0} << (begin % 64));
    while (left == 0 && ++word * 64 < end) left = words_[word];
    return left == 0 ? end : std::min(end, word * 64 + static_cast<size_t>(std::countr_zero(left)));
  }

 private:
  std::vector<uint64_t> words_;
};

template <class Symbol>
class Search {
 public:
  Search(std::span<const Symbol> corpus, std::span<const int64_t> ends, const RepeatSearch& how)
      : corpus_(corpus), ends_(ends), length_(how.length), marks_(corpus.size()) {
    for_each_document([&](size_t begin, size_t end) { windows_ += end - begin - length_ + 1; });
    if (windows_ == 0) return;  // and no document is as long as one, which may be longer than memory
    const size_t threads = windows_ < kFewWindows ? 1 : how.num_threads;
    const size_t bytes = FirstPlaces<Symbol>::places_for(with_slack(windows_)) * sizeof(uint64_t);
    const size_t rounds = (bytes - 1) / std::max<size_t>(how.max_memory, 1) + 1;
    parts_ = threads * std::min(rounds, windows_ / kFewestOfPart + 1);
    Team(threads).run(parts_, [&](size_t part, size_t) { look_at(part); });
  }

  std::vector<Stretch> stretches() const {
    std::vector<Stretch> all;
    for_each_document([&](size_t begin, size_t end) {
      const size_t last = end - length_ + 1;
      for (size_t at = marks_.next(begin, last); at < last;) {
        const size_t first = at;
        size_t covered = at + length_;
        while ((at = marks_.next(at + 1, last)) <= covered && at < last) covered = at + length_;
        all.push_back({static_cast<int64_t>(first), static_cast<int64_t>(covered)});
      }
    });
    return all;
  }

 private:
  struct Window {
    uint64_t hash;
    size_t at;
  };

  // Parts are as large as one another but for chance.
  static size_t with_slack(size_t windows) { return windows + windows / 16; }

  // Of those that hold a window.
  template <class Visit>
  void for_each_document(Visit&& visit) const {
    size_t begin = 0;
    for (const int64_t document_end : ends_) {
      const auto end = static_cast<size_t>(document_end);
      if (end - begin >= length_) visit(begin, end);
      begin = end;
    }
  }

  void look_at(size_t part) {
    FirstPlaces<Symbol> places(corpus_, length_, parts_ == 1 ? windows_ : with_slack(windows_ / parts_));
    Rolling<Symbol> rolling(length_);
    std::vector<Window> batch;
    batch.reserve(kBatch);
    for_each_document([&](size_t begin, size_t end) {
      rolling.start(&corpus_[begin]);
      for (size_t at = begin;; ++at) {
        const uint64_t hash = rolling.hash();
        if (parts_ == 1 || (hash & 0xFFFFFFFF) * parts_ >> 32 == part) batch.push_back({hash, at});
        if (batch.size() == kBatch) ask(places, batch);
        if (at + length_ == end) break;
        rolling.roll(&corpus_[at]);
      }
    });
    ask(places, batch);
  }

  void ask(FirstPlaces<Symbol>& places, std::vector<Window>& batch) {
    Interrupt::poll();
    for (size_t i = 0; i < batch.size(); ++i) {
      if (i + kAhead < batch.size()) places.prefetch(batch[i + kAhead].hash);
      if (places.first(batch[i].hash, batch[i].at) + length_ <= batch[i].at) marks_.set(batch[i].at);
    }
    batch.clear();
  }

  std::span<const Symbol> corpus_;
  std::span<const int64_t> ends_;
  size_t length_, windows_ = 0, parts_ = 1;
  Marks marks_;
};

}  // namespace

template <class Symbol>
std::vector<Stretch> find_repeats(std::span<const Symbol> corpus, std::span<const int64_t> ends,
                                  const RepeatSearch& search) {
  if (corpus.size() >= FirstPlaces<Symbol>::kMostSymbols) {
    throw std::invalid_argument("repeats are found among fewer than 2^40 bytes or tokens, got " +
                                std::to_string(corpus.size()) + ": take the corpus in parts");
  }
  return Search<Symbol>(corpus, ends, search).stretches();
}

template std::vector<Stretch> find_repeats(std::span<const uint8_t>, std::span<const int64_t>, const RepeatSearch&);
template std::vector<Stretch> find_repeats(std::span<const uint32_t>, std::span<const int64_t>, const RepeatSearch&);

}  // namespace cs336::text
