// Best-fit decreasing: each item, the longest first, goes into the fullest bin that still has room for it.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace cs336::text {

struct Packing {
  std::vector<uint64_t> items;  // in the order of the bins
  std::vector<uint64_t> ends;   // where the items of each bin end
};

// lengths in 1..capacity; items of one length are taken in their order. Time is in proportion to the items times the
// logarithm, to base 64, of the capacity. Throws std::invalid_argument for a length outside.
Packing best_fit(std::span<const uint32_t> lengths, uint32_t capacity);

}  // namespace cs336::text
