// MinHash signatures: P(signature_i(a) = signature_i(b)) = jaccard(a, b).
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace cs336::text {

// h_i(x) = a_i x + b_i mod 2^32 over hashes x, which are random already: all that the a_i have to be is odd.
class MinHash {
 public:
  MinHash(size_t num_hashes, uint64_t seed);
  size_t num_hashes() const { return num_hashes_; }
  // signature: num_hashes values; UINT32_MAX where there are no shingles.
  void sign(std::span<const uint64_t> shingles, uint32_t* signature) const;

 private:
  size_t num_hashes_;
  std::vector<uint32_t> a_, b_;  // to a whole number of kLanes
};

}  // namespace cs336::text
