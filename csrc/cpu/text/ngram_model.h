// An n-gram language model with interpolated Kneser-Ney smoothing, one discount an order.
//
//   p_k(w | h) = (max(c(hw) - d_k, 0) + d_k distinct(h) p_{k-1}(w | h')) / sum(h),   p_0 = 1 / (types + 1)
//
// c is how often hw was seen for the highest order, and for the others how many different words it was seen after;
// sum(h) and distinct(h) are over the words that follow h; h' is h without its first word. A word that was never seen
// is the type that p_0 has one too many of.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/text/huge_pages.h"
#include "cpu/text/shingles.h"

namespace cs336::text {

class NgramModel {
 public:
  static constexpr size_t kMostOrder = 8;
  // order: n, 1..kMostOrder. unit: words or characters of the normalized text (shingles.h).
  NgramModel(size_t order, Unit unit) : order_(order), unit_(unit) {}

  // Counts a text, between marks for its begin and end. Throws std::overflow_error beyond 2^32 - 1 units.
  void add(std::string_view utf8);
  struct Score {
    double log_probability = 0;  // natural
    uint64_t units = 0;          // the mark of the end included
  };
  Score score(std::string_view utf8) const;

  // An n-gram, as word and as context of the next.
  struct Entry {
    uint64_t key;  // 0: empty
    uint32_t count, sum, distinct;
  };
  size_t size() const { return used_; }
  std::vector<Entry> entries() const;  // by key
  // How many n-grams of the orders 1, 2, ... were counted once, and twice: 2 n numbers. They set the discounts,
  // d_k = n1 / (n1 + 2 n2).
  std::span<const uint64_t> few() const { return {few_.data(), 2 * order_}; }
  // Throws std::invalid_argument for a key that no n-gram has, or another number of the few.
  void restore(std::span<const Entry> entries, std::span<const uint64_t> few);

 private:
  Entry* slot(uint64_t key) const;
  Entry& entry(uint64_t key);  // made if need be
  void count(const uint64_t* hashes, const uint64_t* before);

  size_t order_;
  Unit unit_;
  TableVector<Entry> table_ = TableVector<Entry>(1024);
  size_t used_ = 0;
  uint64_t units_ = 0;
  std::array<uint64_t, 2 * kMostOrder> few_{};
};

}  // namespace cs336::text
