#include "cpu/text/bpe_train.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <queue>
#include <stdexcept>
#include <string>

namespace cs336::text {
namespace {

constexpr uint32_t kNone = UINT32_MAX;  // between words, and inside tokens
constexpr size_t kProgressEvery = 64;   // merges

// Compares as the first eight bytes do.
uint64_t prefix_of(std::string_view bytes) {
  uint64_t prefix = 0;
  std::memcpy(&prefix, bytes.data(), std::min(bytes.size(), sizeof prefix));
  return __builtin_bswap64(prefix);
}

struct Pair {
  uint32_t left, right;
  uint64_t count;
  std::vector<uint32_t> places;  // where left starts, and places that were so once; ascending
};

// (left, right) -> a number.
class PairTable {
 public:
  // kNone if there is none.
  uint32_t find(uint32_t left, uint32_t right) { return slot(key_of(left, right)).value; }
  void prefetch(uint32_t left, uint32_t right) const { __builtin_prefetch(&slots_[place_of(key_of(left, right))]); }
  // `value` if there was none.
  uint32_t find_or_add(uint32_t left, uint32_t right, uint32_t value) {
    if ((used_ + 1) * 2 > slots_.size()) grow();
    Slot& found = slot(key_of(left, right));
    if (found.value == kNone) {
      found = {key_of(left, right), value};
      ++used_;
    }
    return found.value;
  }

 private:
  struct Slot {
    uint64_t key = 0;
    uint32_t value = kNone;
  };
  static uint64_t key_of(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }
  size_t place_of(uint64_t key) const { return (key * 0x9E3779B97F4A7C15u) >> (64 - std::countr_zero(slots_.size())); }
  Slot& slot(uint64_t key) {
    size_t i = place_of(key);
    while (slots_[i].value != kNone && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
    return slots_[i];
  }
  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& s : old) {
      if (s.value != kNone) slot(s.key) = s;
    }
  }
  std::vector<Slot> slots_ = std::vector<Slot>(1 << 12);
  size_t used_ = 0;
};

// All distinct words one after the other, with a gap before, between and after them; words of the same count stand
// together. A token is written at its first and its last byte, so that both neighbours are one step away.
class Text {
 public:
  explicit Text(std::vector<CountedWord> words) {
    std::sort(words.begin(), words.end(), [](const auto& a, const auto& b) { return a.count > b.count; });
    size_t size = 1;
    for (const CountedWord& word : words) size += word.bytes.size() + 1;
    if (size >= kNone) throw std::length_error("the distinct pieces of the training text exceed 4 GB");
    tokens_.reserve(size);
    tokens_.push_back(kNone);
    for (const CountedWord& word : words) {
      for (const char c : word.bytes) tokens_.push_back(static_cast<uint8_t>(c));
      tokens_.push_back(kNone);
      if (runs_.empty() || runs_.back().count != word.count) runs_.push_back({0, word.count});
      runs_.back().end = static_cast<uint32_t>(tokens_.size());
      total_ += word.bytes.size() * word.count;
    }
    uint32_t run = 0;
    for (size_t place = 0; place < size; place += 1 << kBlockBits) {
      while (run + 1 < runs_.size() && runs_[run].end <= place) ++run;
      run_of_block_.push_back(run);
    }
  }

  size_t size() const { return tokens_.size(); }
  uint64_t total() const { return total_; }
  uint32_t operator[](size_t place) const { return tokens_[place]; }
  const uint32_t* at(size_t place) const { return &tokens_[place]; }

  // How often the word at a place occurs.
  uint64_t count(uint32_t place) const {
    uint32_t run = run_of_block_[place >> kBlockBits];
    while (runs_[run].end <= place) ++run;
    return runs_[run].count;
  }

  void merge(uint32_t begin, uint32_t middle, uint32_t end, uint32_t made) {
    tokens_[middle - 1] = tokens_[middle] = kNone;
    tokens_[begin] = tokens_[end - 1] = made;
  }

 private:
  struct Run {
    uint32_t end;
    uint64_t count;
  };
  static constexpr int kBlockBits = 6;
  std::vector<uint32_t> tokens_;
  std::vector<Run> runs_;
  std::vector<uint32_t> run_of_block_;
  uint64_t total_ = 0;  // bytes of all that was counted
};

// The tokens on one side of the places of a merge.
class Neighbours {
 public:
  struct Token {
    uint64_t count = 0;
    uint32_t uses = 0, pair = kNone;
  };
  explicit Neighbours(size_t num_tokens) : tokens_(num_tokens) {}

  void add(uint32_t token, uint32_t place, uint64_t count) {
    if (tokens_[token].uses++ == 0) met_.push_back(token);
    tokens_[token].count += count;
    places_.emplace_back(token, place);
  }
  Token& operator[](uint32_t token) { return tokens_[token]; }
  const std::vector<uint32_t>& met() const { return met_; }
  // Where the pairs with these tokens start.
  const std::vector<std::pair<uint32_t, uint32_t>>& places() const { return places_; }

  void clear() {
    for (const uint32_t token : met_) tokens_[token] = {};
    met_.clear();
    places_.clear();
  }

 private:
  std::vector<Token> tokens_;
  std::vector<uint32_t> met_;
  std::vector<std::pair<uint32_t, uint32_t>> places_;
};

// A pair is most frequent when it is made: later merges only take from it. So pairs rarer than `floor_` are left alone,
// neither kept nor counted, until no other is left; then the floor sinks, and the text is searched for them.
class Trainer {
 public:
  Trainer(Text text, size_t num_merges)
      : text_(std::move(text)),
        num_merges_(std::min(num_merges, text_.size())),  // each merge makes the text shorter
        before_(256 + num_merges_),
        after_(256 + num_merges_) {
    for (int byte = 0; byte < 256; ++byte) add_token(std::string(1, static_cast<char>(byte)));
    floor_ = std::max<uint64_t>(1, text_.total() / (kFloor * std::max<size_t>(1, num_merges_)));
    find_pairs();
  }

  std::vector<std::pair<uint32_t, uint32_t>> run(const std::function<void(size_t)>& progress) {
    std::vector<std::pair<uint32_t, uint32_t>> merges;
    while (merges.size() < num_merges_) {
      if (queue_.empty() || queue_.top().count < floor_) {
        if (floor_ == 1) break;
        floor_ = (floor_ + kFloorStep - 1) / kFloorStep;
        find_pairs();
        continue;
      }
      Candidate best = queue_.top();
      queue_.pop();
      const uint64_t now = pairs_[best.pair].count;
      if (now != best.count) {  // it became rarer: back into the queue
        best.count = now;
        queue_.push(best);
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
    uint64_t prefix;  // the first bytes of the left token, as a number: decides nearly all ties
    uint32_t pair;
  };
  struct Less {
    const Trainer* trainer;
    bool operator()(const Candidate& a, const Candidate& b) const {
      if (a.count != b.count) return a.count < b.count;
      if (a.prefix != b.prefix) return a.prefix < b.prefix;
      const Pair &x = trainer->pairs_[a.pair], &y = trainer->pairs_[b.pair];
      const int left = trainer->tokens_[x.left].compare(trainer->tokens_[y.left]);
      return left != 0 ? left < 0 : trainer->tokens_[x.right] < trainer->tokens_[y.right];
    }
  };
  // On 100 MB of text the last of N merges had a count of bytes / (14 N) for N = 1000, and of bytes / (89 N) for
  // 32,000.
  static constexpr uint64_t kFloor = 128, kFloorStep = 8;

  template <class Visit>
  void each_pair(Visit&& visit) const {
    for (size_t place = 0, next; place < text_.size(); place = next) {
      const uint32_t left = text_[place];
      next = place + (left == kNone ? 1 : sizes_[left]);
      if (left != kNone && text_[next] != kNone) visit(left, text_[next], static_cast<uint32_t>(place));
    }
  }

  // Adds the pairs that occur `floor_` times or more and are not known yet.
  void find_pairs() {
    struct Found {
      uint64_t count = 0;
      uint32_t uses = 0, pair = kNone;
    };
    PairTable numbers;
    std::vector<Found> all;
    each_pair([&](uint32_t left, uint32_t right, uint32_t place) {
      const uint32_t number = numbers.find_or_add(left, right, static_cast<uint32_t>(all.size()));
      if (number == all.size()) all.emplace_back();
      all[number].count += text_.count(place);
      ++all[number].uses;
    });
    const size_t known = pairs_.size();
    each_pair([&](uint32_t left, uint32_t right, uint32_t place) {
      Found& found = all[numbers.find(left, right)];
      if (found.count < floor_) return;
      if (found.pair == kNone) found.pair = add(left, right, found.count, found.uses);
      if (found.pair >= known) pairs_[found.pair].places.push_back(place);
    });
  }

  void add_token(std::string bytes) {
    sizes_.push_back(static_cast<uint32_t>(bytes.size()));
    tokens_.push_back(std::move(bytes));
  }

  // The pair's number, which may be known already.
  uint32_t add(uint32_t left, uint32_t right, uint64_t count, uint32_t uses) {
    const auto number = static_cast<uint32_t>(pairs_.size());
    const uint32_t found = numbers_.find_or_add(left, right, number);
    if (found != number) return found;
    pairs_.push_back({left, right, count, {}});
    pairs_.back().places.reserve(uses);
    queue_.push({count, prefix_of(tokens_[left]), number});
    return number;
  }

  void take(uint32_t left, uint32_t right, uint64_t count) {
    const uint32_t number = numbers_.find(left, right);
    if (number != kNone) pairs_[number].count -= count;
  }

  void merge(uint32_t number) {
    const uint32_t left = pairs_[number].left, right = pairs_[number].right;
    const auto made = static_cast<uint32_t>(tokens_.size());
    add_token(tokens_[left] + tokens_[right]);
    const uint32_t left_size = sizes_[left], size = sizes_[made];
    uint64_t chained = 0;  // how often a place follows the one before it: the pair of `made` and `left` was there
    const std::vector<uint32_t> places = std::exchange(pairs_[number].places, {});
    for (size_t i = 0; i < std::min(places.size(), kAhead); ++i) __builtin_prefetch(text_.at(places[i]));
    for (size_t i = 0; i < places.size(); ++i) {
      if (i + kAhead < places.size()) __builtin_prefetch(text_.at(places[i + kAhead]));
      const uint32_t begin = places[i], middle = begin + left_size, end = begin + size;
      if (text_[begin] != left || text_[middle] != right) continue;
      const uint64_t count = text_.count(begin);
      const uint32_t before = text_[begin - 1], after = text_[end];
      if (before != kNone) {
        before_.add(before, begin - sizes_[before], count);
        if (before == made) chained += count;
      }
      if (after != kNone) after_.add(after, begin, count);
      text_.merge(begin, middle, end, made);
    }
    for (const uint32_t token : before_.met()) numbers_.prefetch(token, left);
    for (const uint32_t token : after_.met()) numbers_.prefetch(right, token);
    for (const uint32_t token : before_.met()) {
      if (token != made) take(token, left, before_[token].count);
    }
    for (const uint32_t token : after_.met()) take(right, token, after_[token].count);
    after_[left].count -= chained;
    pairs_[number].count = 0;
    add_all(before_, [&](uint32_t token) { return std::pair(token, made); });
    add_all(after_, [&](uint32_t token) { return std::pair(made, token); });
  }

  template <class PairOf>
  void add_all(Neighbours& neighbours, PairOf pair_of) {
    for (const uint32_t token : neighbours.met()) {
      auto& [count, uses, pair] = neighbours[token];
      const auto [left, right] = pair_of(token);
      if (count >= floor_) pair = add(left, right, count, uses);
    }
    for (const auto& [token, place] : neighbours.places()) {
      const uint32_t pair = neighbours[token].pair;
      if (pair != kNone) pairs_[pair].places.push_back(place);
    }
    neighbours.clear();
  }

  static constexpr size_t kAhead = 16;  // places
  Text text_;
  const size_t num_merges_;
  Neighbours before_, after_;
  std::vector<std::string> tokens_;
  std::vector<uint32_t> sizes_;  // of tokens
  uint64_t floor_;
  std::vector<Pair> pairs_;
  PairTable numbers_;  // of pairs
  std::priority_queue<Candidate, std::vector<Candidate>, Less> queue_{Less{this}};
};

}  // namespace

std::vector<std::pair<uint32_t, uint32_t>> train_bpe(WordCounter& counter, size_t num_merges,
                                                     const std::function<void(size_t)>& progress) {
  Text text(counter.words());
  counter.clear();
  return Trainer(std::move(text), num_merges).run(progress);
}

}  // namespace cs336::text
