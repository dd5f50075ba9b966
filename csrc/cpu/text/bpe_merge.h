// BPE of one piece of text, of its bytes or of its characters.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/text/huge_pages.h"
#include "cpu/text/word.h"

namespace cs336::text {

constexpr uint32_t kNoId = UINT32_MAX;
constexpr uint32_t kMaxId = (1 << 24) - 1;
constexpr uint32_t kNoRank = UINT32_MAX;
constexpr uint32_t kMaxRank = (1 << 24) - 2;

using Tokens = std::vector<std::pair<uint32_t, std::string>>;  // id, bytes

// The bytes of each token, by id. No token is empty, so an id with no bytes is not a token.
class TokenBytes {
 public:
  explicit TokenBytes(const Tokens& tokens);
  size_t size() const { return offsets_.size() - 1; }
  std::string_view operator[](uint32_t id) const {
    return {bytes_.data() + offsets_[id], offsets_[id + 1] - offsets_[id]};
  }

 private:
  std::string bytes_;
  std::vector<uint32_t> offsets_;
};

// The tokens that merges begin with.
struct Alphabet {
  // Of each byte, or kNoId. By characters: of those of ASCII, and for the others what stands for a byte of a character
  // that is no token.
  std::array<uint32_t, 256> byte_ids;
  std::vector<uint32_t> char_ids;  // by code point, or kNoId; empty where text is bytes
  uint32_t unknown = kNoId;        // what stands for such a character whole, where nothing stands for its bytes
  bool fuses_unknown = false;      // one stands for several in a row

  bool by_chars() const { return !char_ids.empty(); }
};

struct Merge {
  uint32_t left, right, result;
  uint32_t rank;             // one result has each
  uint32_t order = kNoRank;  // of merges that go by place where several ranks share it; else the rank
};

// (left, right) -> rank, in eight bytes a merge: what is not in a processor's cache costs more than all else.
class MergeTable {
 public:
  explicit MergeTable(size_t capacity);
  // The first of a merge listed twice counts.
  void add(uint32_t left, uint32_t right, uint32_t rank);
  // kNoRank if the two do not merge.
  uint32_t find(uint32_t left, uint32_t right) const {
    const uint64_t mixed = mix(left, right), bit = mixed >> (shift_ - 3);
    if ((filter_[bit / 64] >> bit % 64 & 1) == 0) return kNoRank;
    size_t i = mixed >> shift_;
    const uint64_t first = key_of(mixed), last = first + max_distance();
    for (uint64_t key = first; key <= last && slots_[i] != kEmpty; ++key, i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i] >> kRankBits == key) return slots_[i] & kMaxId;
    }
    return kNoRank;
  }

 private:
  // A pair of ids is a number of 48 bits, and so is its product with an odd one, from which it could be had back. The
  // upper bits say where it belongs; a slot holds the lower ones, how far from there it is, and the rank.
  static constexpr int kPairBits = 48, kRankBits = 24, kKeyBits = 64 - kRankBits;
  static constexpr uint64_t kEmpty = UINT64_MAX;
  static uint64_t mix(uint32_t left, uint32_t right) {
    return ((uint64_t{left} << 24 | right) * kSecrets[0]) & ((uint64_t{1} << kPairBits) - 1);
  }
  uint64_t key_of(uint64_t mixed) const { return (mixed & ((uint64_t{1} << shift_) - 1)) << (kKeyBits - shift_); }
  uint64_t max_distance() const { return (uint64_t{1} << (kKeyBits - shift_)) - 1; }
  void make(size_t slots);
  void put(uint64_t mixed, uint32_t rank);

  TableVector<uint64_t> slots_;
  TableVector<uint64_t> filter_;  // eight bits a slot, by the upper bits of the product: most pairs do not merge
  size_t used_ = 0;
  int shift_ = 0;
};

// What a piece of text merges to.
class Merger {
 public:
  Merger(const TokenBytes& tokens, const Alphabet& alphabet, const std::vector<Merge>& merges);
  // Merges any two tokens that together are a token, and takes the id for the rank (tiktoken's rule). ordinary: the ids
  // of all but the special ones, ascending.
  Merger(const TokenBytes& tokens, const Alphabet& alphabet, const std::vector<uint32_t>& ordinary);

  // Writes the ids of a piece by merges of a rank lower than `below` alone, and returns how many; out has room for
  // piece.size(). Throws std::invalid_argument for a byte that has no token.
  size_t merge(std::string_view piece, uint32_t below, uint32_t* out) const;
  bool has_bytes(std::string_view piece) const;

 private:
  size_t merge_few(const uint8_t* piece, size_t size, uint32_t below, uint32_t* out) const;
  size_t merge_many(const uint8_t* piece, size_t size, uint32_t below, uint32_t* out) const;
  uint32_t byte_id(uint8_t byte) const;
  // begun(place, id) for each token that the merges of a piece begin with.
  template <class Begun>
  void begin(const uint8_t* piece, size_t size, Begun&& begun) const;
  void add(const TokenBytes& tokens, const Merge& merge);

  Alphabet alphabet_;
  std::vector<uint32_t> byte_ranks_;  // of the merge of each two bytes, left * 256 + right
  MergeTable ranks_;
  uint32_t order_of(uint32_t rank) const { return orders_.empty() ? rank : orders_[rank]; }

  std::vector<uint32_t> results_;  // by rank
  std::vector<uint32_t> orders_;   // by rank, or none
};

}  // namespace cs336::text
