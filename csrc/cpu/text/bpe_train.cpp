#include "cpu/text/bpe_train.h"

#include <algorithm>
#include <bit>
#include <queue>
#include <stdexcept>
#include <string>

namespace cs336::text {
namespace {

constexpr uint32_t kNone = UINT32_MAX;  // between words, and inside tokens
constexpr size_t kProgressEvery = 64;   // merges

struct Pair {
  uint32_t left, right;
  uint64_t count;
  std::vector<uint32_t> places;  // where left starts, and places that were so once
};

// (left, right) -> index of its Pair.
class PairIndex {
 public:
  uint32_t& at(uint32_t left, uint32_t right) {
    if ((used_ + 1) * 2 > slots_.size()) grow();
    Slot& slot = find(static_cast<uint64_t>(left) << 32 | right);
    if (slot.index == kNone) {
      slot.key = static_cast<uint64_t>(left) << 32 | right;
      ++used_;
    }
    return slot.index;  // kNone if new: the caller sets it
  }

 private:
  struct Slot {
    uint64_t key = 0;
    uint32_t index = kNone;
  };
  Slot& find(uint64_t key) {
    size_t i = (key * 0x9E3779B97F4A7C15u) >> (64 - std::countr_zero(slots_.size()));
    while (slots_[i].index != kNone && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
    return slots_[i];
  }
  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.index != kNone) find(slot.key) = slot;
    }
  }
  std::vector<Slot> slots_ = std::vector<Slot>(1 << 12);
  size_t used_ = 0;
};

// All words one after the other, with a gap before, between and after them. A token is written at its first and its
// last byte, so that both neighbours are one step away.
class Trainer {
 public:
  explicit Trainer(const std::vector<CountedWord>& words) {
    size_t size = 1;
    for (const CountedWord& word : words) size += word.bytes.size() + 1;
    if (size >= kNone) throw std::length_error("the distinct pieces of the training text exceed 4 GB");
    for (int byte = 0; byte < 256; ++byte) tokens_.emplace_back(1, static_cast<char>(byte));
    text_.reserve(size);
    word_of_.reserve(size);
    text_.push_back(kNone);
    word_of_.push_back(0);
    for (const CountedWord& word : words) {
      for (const char c : word.bytes) text_.push_back(static_cast<uint8_t>(c));
      text_.push_back(kNone);
      word_of_.insert(word_of_.end(), word.bytes.size() + 1, static_cast<uint32_t>(counts_.size()));
      counts_.push_back(word.count);
    }
    for (uint32_t i = 0; i + 1 < size; ++i) {
      if (text_[i] != kNone && text_[i + 1] != kNone) add(text_[i], text_[i + 1], i);
    }
    push_new();
  }

  std::vector<std::pair<uint32_t, uint32_t>> run(size_t num_merges, const std::function<void(size_t)>& progress) {
    std::vector<std::pair<uint32_t, uint32_t>> merges;
    while (merges.size() < num_merges && !queue_.empty()) {
      const Candidate best = queue_.top();
      queue_.pop();
      const uint64_t now = pairs_[best.pair].count;
      if (now != best.count) {  // it became rarer: back into the queue
        if (now > 0) queue_.push({now, best.pair});
        continue;
      }
      if (merges.size() % kProgressEvery == 0) progress(merges.size());
      merges.emplace_back(pairs_[best.pair].left, pairs_[best.pair].right);
      merge(best.pair);
    }
    progress(merges.size());
    return merges;
  }

 private:
  struct Candidate {
    uint64_t count;
    uint32_t pair;
  };
  struct Less {
    const Trainer* trainer;
    bool operator()(const Candidate& a, const Candidate& b) const {
      if (a.count != b.count) return a.count < b.count;
      const Pair &x = trainer->pairs_[a.pair], &y = trainer->pairs_[b.pair];
      const int left = trainer->tokens_[x.left].compare(trainer->tokens_[y.left]);
      return left != 0 ? left < 0 : trainer->tokens_[x.right] < trainer->tokens_[y.right];
    }
  };

  Pair& pair_at(uint32_t left, uint32_t right) {
    uint32_t& index = index_.at(left, right);
    if (index == kNone) {
      index = static_cast<uint32_t>(pairs_.size());
      pairs_.push_back({left, right, 0, {}});
    }
    return pairs_[index];
  }

  void add(uint32_t left, uint32_t right, uint32_t place) {
    Pair& pair = pair_at(left, right);
    pair.count += counts_[word_of_[place]];
    pair.places.push_back(place);
  }

  void remove(uint32_t left, uint32_t right, uint32_t place) { pair_at(left, right).count -= counts_[word_of_[place]]; }

  // Pairs only become rarer after the merge that made the newer of their tokens, so each enters the queue once.
  void push_new() {
    for (; queued_ < pairs_.size(); ++queued_) {
      if (pairs_[queued_].count > 0) queue_.push({pairs_[queued_].count, static_cast<uint32_t>(queued_)});
    }
  }

  void merge(uint32_t index) {
    const uint32_t left = pairs_[index].left, right = pairs_[index].right;
    const auto made = static_cast<uint32_t>(tokens_.size());
    tokens_.push_back(tokens_[left] + tokens_[right]);
    const auto left_size = static_cast<uint32_t>(tokens_[left].size());
    const auto right_size = static_cast<uint32_t>(tokens_[right].size());
    const std::vector<uint32_t> places = std::exchange(pairs_[index].places, {});
    for (const uint32_t begin : places) {  // ascending: leftmost first
      const uint32_t middle = begin + left_size, end = middle + right_size;
      if (text_[begin] != left || text_[middle] != right) continue;
      const uint32_t before = text_[begin - 1], after = text_[end];
      if (before != kNone) {
        const auto start = begin - static_cast<uint32_t>(tokens_[before].size());
        remove(before, left, begin);
        add(before, made, start);
      }
      if (after != kNone) {
        remove(right, after, begin);
        add(made, after, begin);
      }
      text_[middle - 1] = text_[middle] = kNone;
      text_[begin] = text_[end - 1] = made;
    }
    pairs_[index].count = 0;
    push_new();
  }

  std::vector<std::string> tokens_;
  std::vector<uint32_t> text_, word_of_;
  std::vector<uint64_t> counts_;  // of words
  std::vector<Pair> pairs_;
  PairIndex index_;
  size_t queued_ = 0;
  std::priority_queue<Candidate, std::vector<Candidate>, Less> queue_{Less{this}};
};

}  // namespace

std::vector<std::pair<uint32_t, uint32_t>> train_bpe(const std::vector<CountedWord>& words, size_t num_merges,
                                                     const std::function<void(size_t)>& progress) {
  return Trainer(words).run(num_merges, progress);
}

}  // namespace cs336::text
