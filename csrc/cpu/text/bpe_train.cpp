#include "cpu/text/bpe_train.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <queue>
#include <span>
#include <stdexcept>
#include <string>

#include "cpu/text/parallel.h"

namespace cs336::text {
namespace {

constexpr uint32_t kNone = UINT32_MAX;  // between words, and inside tokens
constexpr size_t kProgressEvery = 64;   // merges
constexpr size_t kAhead = 16;           // places and words, prefetched
constexpr size_t kPartWords = 4096;     // distinct words that are worth a thread

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
// together. A token is written at its first and its last byte, so that both neighbours are one step away. The parts of
// a text end at gaps, so that threads may each change one.
class Text {
 public:
  Text(std::vector<CountedWord> words, Team& team, size_t num_parts) {
    std::sort(words.begin(), words.end(), [](const auto& a, const auto& b) { return a.count > b.count; });
    size_t size = 1;
    for (const CountedWord& word : words) size += word.bytes.size() + 1;
    if (size >= kNone) throw std::length_error("the distinct pieces of the training text exceed 4 GB");
    tokens_ = std::make_unique_for_overwrite<uint32_t[]>(size);
    tokens_[0] = kNone;
    std::vector<size_t> first_words;  // of parts
    uint32_t place = 1;
    for (size_t i = 0; i < words.size(); ++i) {
      if (place * num_parts > size * first_words.size()) {
        part_begins_.push_back(place);
        first_words.push_back(i);
      }
      place += words[i].bytes.size() + 1;
      if (runs_.empty() || runs_.back().count != words[i].count) runs_.push_back({0, words[i].count});
      runs_.back().end = place;
      total_ += words[i].bytes.size() * words[i].count;
    }
    part_begins_.push_back(place);
    first_words.push_back(words.size());
    team.run(this->num_parts(), [&](size_t part, size_t) {
      uint32_t* token = &tokens_[part_begins_[part]];
      for (size_t i = first_words[part]; i < first_words[part + 1]; ++i) {
        if (i + kAhead < words.size()) __builtin_prefetch(words[i + kAhead].bytes.data());
        for (const char c : words[i].bytes) *token++ = static_cast<uint8_t>(c);
        *token++ = kNone;
      }
    });
    uint32_t run = 0;
    for (size_t block = 0; block < size; block += 1 << kBlockBits) {
      while (run + 1 < runs_.size() && runs_[run].end <= block) ++run;
      run_of_block_.push_back(run);
    }
  }

  size_t num_parts() const { return part_begins_.size() - 1; }
  uint32_t begin_of(size_t part) const { return part_begins_[part]; }
  uint32_t end_of(size_t part) const { return part_begins_[part + 1]; }
  size_t size() const { return part_begins_.back(); }
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
  std::unique_ptr<uint32_t[]> tokens_;
  std::vector<uint32_t> part_begins_;  // and where the last ends
  std::vector<Run> runs_;
  std::vector<uint32_t> run_of_block_;
  uint64_t total_ = 0;  // bytes of all that was counted
};

// What one part of the text has of a pair.
struct Share {
  uint64_t count = 0;
  uint32_t uses = 0;         // places
  uint32_t* next = nullptr;  // where to write the next of them; none for a pair that is left alone
};

// The tokens on one side of the places of a merge, in one part of the text; on cache lines of its own.
class alignas(128) Neighbours {
 public:
  explicit Neighbours(size_t num_tokens) : shares_(num_tokens) {}

  void add(uint32_t token, uint32_t place, uint64_t count) {
    if (shares_[token].uses++ == 0) met_.push_back(token);
    shares_[token].count += count;
    places_.emplace_back(token, place);
  }
  const std::vector<uint32_t>& met() const { return met_; }
  // Of the pair with this token.
  Share& operator[](uint32_t token) { return shares_[token]; }

  // Hands the places over to their pairs, and forgets all.
  void flush() {
    for (const auto& [token, place] : places_) {
      uint32_t*& next = shares_[token].next;
      if (next != nullptr) *next++ = place;
    }
    for (const uint32_t token : met_) shares_[token] = {};
    met_.clear();
    places_.clear();
  }

 private:
  std::vector<Share> shares_;
  std::vector<uint32_t> met_;
  std::vector<std::pair<uint32_t, uint32_t>> places_;  // where the pairs with these tokens start
};

// A pair is most frequent when it is made: later merges only take from it. So pairs rarer than `floor_` are left alone,
// neither kept nor counted, until no other is left; then the floor sinks, and the text is searched for them.
class Trainer {
 public:
  Trainer(Text text, size_t num_merges, Team& team)
      : text_(std::move(text)),
        team_(team),
        num_merges_(std::min(num_merges, text_.size())),  // each merge makes the text shorter
        before_(text_.num_parts(), Neighbours(256 + num_merges_)),
        after_(text_.num_parts(), Neighbours(256 + num_merges_)) {
    for (int byte = 0; byte < 256; ++byte) add_token(std::string(1, static_cast<char>(byte)));
    floor_ = std::max<uint64_t>(1, text_.total() / (kFloor * std::max<size_t>(1, num_merges_)));
    find_pairs();
  }

  std::vector<std::pair<uint32_t, uint32_t>> run(const std::function<void(size_t)>& progress) {
    std::vector<std::pair<uint32_t, uint32_t>> merges;
    while (merges.size() < num_merges_) {
      if (queue_.empty()) {
        if (!refill()) break;
        continue;
      }
      Candidate best = queue_.top();
      queue_.pop();
      const uint64_t now = pairs_[best.pair].count;
      if (now != best.count) {  // it became rarer
        best.count = now;
        push(best);
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

  void push(const Candidate& candidate) {
    if (candidate.count >= queued_) {
      queue_.push(candidate);
    } else {
      rarer_.push_back(candidate);
    }
  }

  // Fills the empty queue with the most frequent of the rarer pairs. False if no pair is left.
  bool refill() {
    uint64_t most = 0;
    for (const Candidate& candidate : rarer_) most = std::max(most, candidate.count);
    if (most < floor_) {
      if (floor_ == 1) return false;
      floor_ = (floor_ + kFloorStep - 1) / kFloorStep;
      find_pairs();
      return true;
    }
    queued_ = std::max(floor_, most - most / 4);
    const auto rare = std::partition(rarer_.begin(), rarer_.end(), [&](auto& c) { return c.count < queued_; });
    for (auto candidate = rare; candidate != rarer_.end(); ++candidate) queue_.push(*candidate);
    rarer_.erase(rare, rarer_.end());
    return true;
  }

  template <class Visit>
  void each_pair(size_t part, Visit&& visit) const {
    PollEvery<1 << 16> poll;
    for (uint32_t place = text_.begin_of(part), next; place < text_.end_of(part); place = next, poll()) {
      const uint32_t left = text_[place];
      next = place + (left == kNone ? 1 : sizes_[left]);
      if (left != kNone && text_[next] != kNone) visit(left, text_[next], place);
    }
  }

  // Adds the pairs that occur `floor_` times or more and are not known yet.
  void find_pairs() {
    struct Found {
      uint32_t left, right;
      Share share;
    };
    struct Part {
      PairTable numbers;
      std::vector<Found> found;
    };
    std::vector<Part> parts(text_.num_parts());
    team_.run(parts.size(), [&](size_t part, size_t) {
      PairTable& numbers = parts[part].numbers;
      std::vector<Found>& found = parts[part].found;
      each_pair(part, [&](uint32_t left, uint32_t right, uint32_t place) {
        const uint32_t number = numbers.find_or_add(left, right, static_cast<uint32_t>(found.size()));
        if (number == found.size()) found.push_back({left, right, {}});
        found[number].share.count += text_.count(place);
        ++found[number].share.uses;
      });
    });
    for (size_t i = 0; i < parts.size(); ++i) {
      for (const auto& [left, right, share] : parts[i].found) {
        if (share.count == 0) continue;  // was added with an earlier part
        shares_.clear();
        for (size_t k = i; k < parts.size(); ++k) {
          const uint32_t number = parts[k].numbers.find(left, right);
          if (number != kNone) shares_.push_back(&parts[k].found[number].share);
        }
        add(left, right, take_counts());
      }
    }
    team_.run(parts.size(), [&](size_t part, size_t) {
      PairTable& numbers = parts[part].numbers;
      std::vector<Found>& found = parts[part].found;
      each_pair(part, [&](uint32_t left, uint32_t right, uint32_t place) {
        uint32_t*& next = found[numbers.find(left, right)].share.next;
        if (next != nullptr) *next++ = place;
      });
    });
  }

  // Of the pair whose shares are `shares_`, and leaves none.
  uint64_t take_counts() {
    uint64_t count = 0;
    for (Share* share : shares_) count += std::exchange(share->count, 0);
    return count;
  }

  void add_token(std::string bytes) {
    sizes_.push_back(static_cast<uint32_t>(bytes.size()));
    tokens_.push_back(std::move(bytes));
  }

  // Makes a pair of `shares_`, unless it is rare or known.
  void add(uint32_t left, uint32_t right, uint64_t count) {
    const auto number = static_cast<uint32_t>(pairs_.size());
    if (count < floor_ || numbers_.find_or_add(left, right, number) != number) return;
    size_t uses = 0;
    for (const Share* share : shares_) uses += share->uses;
    pairs_.push_back({left, right, count, std::vector<uint32_t>(uses)});
    uint32_t* next = pairs_.back().places.data();
    for (Share* share : shares_) {
      share->next = next;
      next += share->uses;
    }
    push({count, prefix_of(tokens_[left]), number});
  }

  void take(uint32_t left, uint32_t right, uint64_t count) {
    const uint32_t number = numbers_.find(left, right);
    if (number != kNone) pairs_[number].count -= count;
  }

  void merge(uint32_t number) {
    Interrupt::poll();
    const uint32_t left = pairs_[number].left, right = pairs_[number].right;
    const auto made = static_cast<uint32_t>(tokens_.size());
    add_token(tokens_[left] + tokens_[right]);
    const std::vector<uint32_t> places = std::exchange(pairs_[number].places, {});
    pairs_[number].count = 0;
    const size_t num_parts = places.size() < kShared ? 1 : text_.num_parts();
    std::atomic<uint64_t> chained = 0;
    team_.run(num_parts, [&](size_t part, size_t) {
      std::span<const uint32_t> own = places;
      if (num_parts > 1) {
        own = {std::lower_bound(own.begin(), own.end(), text_.begin_of(part)),
               std::lower_bound(own.begin(), own.end(), text_.end_of(part))};
      }
      chained += replace(own, left, right, made, before_[part], after_[part]);
    });
    for (size_t part = 0; part < num_parts; ++part) {
      for (const uint32_t token : before_[part].met()) numbers_.prefetch(token, left);
      for (const uint32_t token : after_[part].met()) numbers_.prefetch(right, token);
    }
    each_neighbour(before_, num_parts, [&](uint32_t token, uint64_t count) {
      if (token != made) take(token, left, count);
      add(token, made, count);
    });
    each_neighbour(after_, num_parts, [&](uint32_t token, uint64_t count) {
      take(right, token, count);
      add(made, token, token == left ? count - chained : count);
    });
    team_.run(num_parts, [&](size_t part, size_t) {
      before_[part].flush();
      after_[part].flush();
    });
  }

  // Writes `made` at places where left and right are, and collects their neighbours. Returns how often a place follows
  // the one before it: the pair of `made` and `left` was there, for a moment.
  uint64_t replace(std::span<const uint32_t> places, uint32_t left, uint32_t right, uint32_t made,
                   Neighbours& before_all, Neighbours& after_all) {
    const uint32_t left_size = sizes_[left], size = sizes_[made];
    uint64_t chained = 0;
    for (size_t i = 0; i < std::min(places.size(), kAhead); ++i) __builtin_prefetch(text_.at(places[i]));
    for (size_t i = 0; i < places.size(); ++i) {
      if (i + kAhead < places.size()) __builtin_prefetch(text_.at(places[i + kAhead]));
      const uint32_t begin = places[i], middle = begin + left_size, end = begin + size;
      if (text_[begin] != left || text_[middle] != right) continue;
      const uint64_t count = text_.count(begin);
      const uint32_t before = text_[begin - 1], after = text_[end];
      if (before != kNone) {
        before_all.add(before, begin - sizes_[before], count);
        if (before == made) chained += count;
      }
      if (after != kNone) after_all.add(after, begin, count);
      text_.merge(begin, middle, end, made);
    }
    return chained;
  }

  // visit(token, count) for each token on one side of the places of a merge, with `shares_` those of its pair.
  template <class Visit>
  void each_neighbour(std::vector<Neighbours>& parts, size_t num_parts, Visit&& visit) {
    for (size_t i = 0; i < num_parts; ++i) {
      for (const uint32_t token : parts[i].met()) {
        if (parts[i][token].count == 0) continue;  // was visited with an earlier part
        shares_.clear();
        for (size_t k = i; k < num_parts; ++k) {
          if (parts[k][token].uses != 0) shares_.push_back(&parts[k][token]);
        }
        visit(token, take_counts());
      }
    }
  }

  static constexpr size_t kShared = 512;  // places that are worth waking threads
  Text text_;
  Team& team_;
  const size_t num_merges_;
  std::vector<Neighbours> before_, after_;  // of each part of the text
  std::vector<Share*> shares_;
  std::vector<std::string> tokens_;
  std::vector<uint32_t> sizes_;  // of tokens
  uint64_t floor_;
  std::vector<Pair> pairs_;
  PairTable numbers_;  // of pairs
  // A queue of all pairs would not fit a core's cache: those rarer than `queued_` wait beside it.
  std::priority_queue<Candidate, std::vector<Candidate>, Less> queue_{Less{this}};
  std::vector<Candidate> rarer_;
  uint64_t queued_ = UINT64_MAX;
};

}  // namespace

std::vector<std::pair<uint32_t, uint32_t>> train_bpe(WordCounter& counter, size_t num_merges,
                                                     const std::function<void(size_t)>& progress) {
  std::vector<CountedWord> words = counter.words();
  const size_t num_threads = std::min(counter.num_threads(), 1 + words.size() / kPartWords);
  Team team(num_threads);
  Text text(std::move(words), team, num_threads);
  counter.clear();
  return Trainer(std::move(text), num_merges, team).run(progress);
}

}  // namespace cs336::text
