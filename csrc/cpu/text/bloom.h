// A Bloom filter: a set that may say yes where it should say no, with a probability that its size decides.
//
//   bits = -n ln(p) / ln(2)^2,   probes = bits / n ln(2)      for n keys at an error of p
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace cs336::text {

class BloomFilter {
 public:
  // capacity > 0 keys; 0 < error < 1.
  BloomFilter(uint64_t capacity, double error);
  // From what bytes() gave. Throws std::invalid_argument if it is no filter, or a part of one.
  explicit BloomFilter(std::string_view bytes);

  // Whether all of the bits of a key were set already; they are now.
  bool add(std::string_view key);
  bool contains(std::string_view key) const;
  uint64_t num_bits() const { return num_bits_; }
  uint32_t num_probes() const { return num_probes_; }
  std::string bytes() const;

 private:
  template <class Visit>
  void probe(std::string_view key, Visit&& visit) const;
  uint64_t num_bits_;
  uint32_t num_probes_;
  std::vector<uint64_t> words_;
};

}  // namespace cs336::text
