#include "cpu/text/minhash.h"

#include <algorithm>

#include "cpu/text/hash.h"
#include "cpu/text/widest.h"

namespace cs336::text {
namespace {

constexpr size_t kLanes = 32;  // minima that stay in registers: four of AVX2, with as many for a and b

CS336_WIDEST void minima(const uint32_t* x, size_t count, const uint32_t* a, const uint32_t* b, uint32_t* out) {
  uint32_t least[kLanes];
  std::fill_n(least, kLanes, UINT32_MAX);
  for (size_t s = 0; s < count; ++s) {
    for (size_t i = 0; i < kLanes; ++i) least[i] = std::min(least[i], a[i] * x[s] + b[i]);
  }
  std::copy_n(least, kLanes, out);
}

}  // namespace

MinHash::MinHash(size_t num_hashes, uint64_t seed) : num_hashes_(num_hashes) {
  const size_t lanes = (num_hashes + kLanes - 1) / kLanes * kLanes;
  for (size_t i = 0; i < lanes; ++i) {
    a_.push_back(static_cast<uint32_t>(hash_number(2 * i, hash_number(seed))) | 1);
    b_.push_back(static_cast<uint32_t>(hash_number(2 * i + 1, hash_number(seed))));
  }
}

void MinHash::sign(std::span<const uint64_t> shingles, uint32_t* signature) const {
  thread_local std::vector<uint32_t> x;
  x.clear();
  for (const uint64_t shingle : shingles) x.push_back(static_cast<uint32_t>(shingle >> 32));
  uint32_t least[kLanes];
  for (size_t first = 0; first < num_hashes_; first += kLanes) {
    minima(x.data(), x.size(), a_.data() + first, b_.data() + first, least);
    std::copy_n(least, std::min(kLanes, num_hashes_ - first), signature + first);
  }
}

}  // namespace cs336::text
