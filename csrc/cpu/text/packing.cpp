#include "cpu/text/packing.h"

#include <bit>
#include <numeric>
#include <stdexcept>
#include <string>

namespace cs336::text {
namespace {

constexpr uint64_t kNone = UINT64_MAX;

// A set of numbers below a bound, by levels of 64-bit words: a bit of one level stands for a word of the level below.
class Numbers {
 public:
  explicit Numbers(size_t bound) {
    do {
      bound = (bound + 63) / 64;
      levels_.emplace_back(bound);
    } while (bound > 1);
  }

  void insert(size_t number) {
    for (auto& level : levels_) {
      level[number / 64] |= uint64_t{1} << number % 64;
      number /= 64;
    }
  }
  void erase(size_t number) {
    for (auto& level : levels_) {
      level[number / 64] &= ~(uint64_t{1} << number % 64);
      if (level[number / 64] != 0) return;
      number /= 64;
    }
  }
  // The smallest that is not below `number`, or kNone.
  uint64_t at_least(size_t number) const {
    for (size_t i = 0; i < levels_.size(); ++i) {
      if (number / 64 >= levels_[i].size()) return kNone;
      const uint64_t rest = levels_[i][number / 64] >> number % 64;
      if (rest == 0) {
        number = number / 64 + 1;
        continue;
      }
      number += static_cast<size_t>(std::countr_zero(rest));
      while (i-- > 0) number = number * 64 + static_cast<size_t>(std::countr_zero(levels_[i][number]));
      return number;
    }
    return kNone;
  }

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

// Indices of items, the longest first, equal ones in order.
std::vector<uint64_t> longest_first(std::span<const uint32_t> lengths, uint32_t capacity) {
  std::vector<uint64_t> starts(size_t{capacity} + 2), order(lengths.size());
  for (const uint32_t length : lengths) ++starts[capacity - length + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  for (size_t i = 0; i < lengths.size(); ++i) order[starts[capacity - lengths[i]]++] = i;
  return order;
}

}  // namespace

Packing best_fit(std::span<const uint32_t> lengths, uint32_t capacity) {
  for (const uint32_t length : lengths) {
    if (length == 0 || length > capacity) {
      throw std::invalid_argument("an item of length " + std::to_string(length) + " does not fit into 1.." +
                                  std::to_string(capacity));
    }
  }
  Numbers rooms(size_t{capacity} + 1);                           // that some bin has left
  std::vector<uint64_t> with_room(size_t{capacity} + 1, kNone);  // the last bin of each, and
  std::vector<uint64_t> before, count;                           // for a bin the next one of its room; its items
  std::vector<uint64_t> bin_of(lengths.size());
  const std::vector<uint64_t> order = longest_first(lengths, capacity);
  for (const uint64_t item : order) {
    uint64_t room = rooms.at_least(lengths[item]), bin = count.size();
    if (room == kNone) {
      room = capacity;
      before.push_back(kNone);
      count.push_back(0);
    } else {
      bin = with_room[room];
      with_room[room] = before[bin];
      if (with_room[room] == kNone) rooms.erase(room);
    }
    room -= lengths[item];
    bin_of[item] = bin;
    ++count[bin];
    if (room == 0) continue;
    if (with_room[room] == kNone) rooms.insert(room);
    before[bin] = with_room[room];
    with_room[room] = bin;
  }
  Packing packing{std::vector<uint64_t>(lengths.size()), std::vector<uint64_t>(count.size())};
  std::partial_sum(count.begin(), count.end(), packing.ends.begin());
  std::vector<uint64_t> next(count.size());
  for (size_t bin = 1; bin < count.size(); ++bin) next[bin] = packing.ends[bin - 1];
  for (const uint64_t item : order) packing.items[next[bin_of[item]]++] = item;
  return packing;
}

}  // namespace cs336::text
