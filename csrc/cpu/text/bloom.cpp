#include "cpu/text/bloom.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cpu/text/hash.h"

namespace cs336::text {
namespace {

constexpr std::string_view kMagic = "cs336bf2";
constexpr uint64_t kSecondSeed = 0xA0761D6478BD642Fu;
constexpr uint32_t kMostProbes = 1100;  // log2 of one over the smallest error that a double holds, 2^-1074
constexpr double kMostBits = 0x1p46;    // 8 TiB: no machine has them, and more would not fit the numbers here

}  // namespace

BloomFilter::BloomFilter(uint64_t capacity, double error) {
  const double ln2 = std::log(2.0), bits = -static_cast<double>(capacity) * std::log(error) / (ln2 * ln2);
  if (!(bits < kMostBits)) {
    throw std::invalid_argument("a Bloom filter for " + std::to_string(capacity) +
                                " texts at this error would take more than 8 TiB: ask for a smaller capacity");
  }
  num_bits_ = std::max<uint64_t>(64, static_cast<uint64_t>(std::ceil(bits)));
  num_probes_ = std::max(1u, static_cast<uint32_t>(std::lround(bits / static_cast<double>(capacity) * ln2)));
  words_.resize((num_bits_ + 63) / 64);
}

BloomFilter::BloomFilter(std::string_view bytes) {
  const size_t header = kMagic.size() + sizeof(num_bits_) + sizeof(num_probes_);
  if (!bytes.starts_with(kMagic) || bytes.size() < header) {
    throw std::invalid_argument("expected the bytes of a Bloom filter, which begin with " + std::string(kMagic));
  }
  std::memcpy(&num_bits_, bytes.data() + kMagic.size(), sizeof(num_bits_));
  std::memcpy(&num_probes_, bytes.data() + kMagic.size() + sizeof(num_bits_), sizeof(num_probes_));
  const size_t size = bytes.size() - header;
  if (num_probes_ == 0 || num_probes_ > kMostProbes) {
    throw std::invalid_argument("a Bloom filter has 1 to " + std::to_string(kMostProbes) + " probes, this one " +
                                std::to_string(num_probes_) + ": it is damaged");
  }
  if (num_bits_ == 0 || size != (num_bits_ - 1) / 64 * 8 + 8) {
    throw std::invalid_argument("a Bloom filter of " + std::to_string(num_bits_) + " bits has " + std::to_string(size) +
                                " bytes: it is cut or damaged");
  }
  words_.resize(size / 8);
  std::memcpy(words_.data(), bytes.data() + header, size);
}

// Two hashes make all: the places are h1 + i h2 (Kirsch and Mitzenmacher), each scaled into the bits.
template <class Visit>
void BloomFilter::probe(std::string_view key, Visit&& visit) const {
  uint64_t hash = hash_bytes(key);
  const uint64_t step = hash_number(hash, kSecondSeed) | 1;
  for (uint32_t i = 0; i < num_probes_; ++i, hash += step) {
    const auto bit = static_cast<uint64_t>(static_cast<unsigned __int128>(hash) * num_bits_ >> 64);
    visit(bit / 64, uint64_t{1} << bit % 64);
  }
}

bool BloomFilter::add(std::string_view key) {
  bool all = true;
  probe(key, [&](uint64_t word, uint64_t mask) {
    all &= (words_[word] & mask) != 0;
    words_[word] |= mask;
  });
  return all;
}

bool BloomFilter::contains(std::string_view key) const {
  bool all = true;
  probe(key, [&](uint64_t word, uint64_t mask) { all &= (words_[word] & mask) != 0; });
  return all;
}

std::string BloomFilter::bytes() const {
  std::string out(kMagic);
  out.append(reinterpret_cast<const char*>(&num_bits_), sizeof(num_bits_));
  out.append(reinterpret_cast<const char*>(&num_probes_), sizeof(num_probes_));
  return out.append(reinterpret_cast<const char*>(words_.data()), words_.size() * 8);
}

}  // namespace cs336::text
