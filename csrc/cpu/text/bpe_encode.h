// Byte-level BPE: text to token ids and back.
#pragma once
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/text/pretokenize.h"
#include "cpu/text/special.h"
#include "cpu/text/word.h"
#include "cpu/text/word_cache.h"

namespace cs336::text {

// A growing array of ids whose memory can be handed over; free it with std::free.
class Ids {
 public:
  Ids() = default;
  Ids(Ids&& other) noexcept { *this = std::move(other); }
  Ids& operator=(Ids&& other) noexcept;
  ~Ids() { std::free(data_); }

  const uint32_t* data() const { return data_; }
  size_t size() const { return size_; }
  void clear() { size_ = 0; }
  // Room for `more` ids at the end: write there, then call advance.
  uint32_t* room(size_t more) {
    if (size_ + more > capacity_) grow(size_ + more);
    return data_ + size_;
  }
  void advance(size_t count) { size_ += count; }
  void push(uint32_t id) {
    *room(1) = id;
    ++size_;
  }

 private:
  void grow(size_t least);
  uint32_t* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

// The bytes of each token, by id. No token is empty, so an id with no bytes is not a token.
class TokenBytes {
 public:
  static constexpr size_t kPadding = 16;  // bytes after the last token that may be read

  explicit TokenBytes(const std::vector<std::pair<uint32_t, std::string>>& tokens);
  size_t size() const { return offsets_.size() - 1; }
  bool contains(uint64_t id) const { return id < size() && offsets_[id] != offsets_[id + 1]; }
  std::string_view operator[](uint32_t id) const {
    return {bytes_.data() + offsets_[id], offsets_[id + 1] - offsets_[id]};
  }

 private:
  std::string bytes_;
  std::vector<size_t> offsets_;
};

// Bytes -> id. The bytes are not kept; they must differ.
class TokenIndex {
 public:
  explicit TokenIndex(size_t capacity) : slots_(std::bit_ceil(2 * capacity + 1), {{}, kNoId, 0}) {}
  void add(std::string_view bytes, uint32_t id);
  // kNoId if there is none.
  uint32_t find(std::string_view bytes) const;
  template <class Visit>
  void for_each(Visit&& visit) const {
    for (const Slot& slot : slots_) {
      if (slot.id != kNoId) visit(slot.bytes, slot.id);
    }
  }

 private:
  struct Slot {
    std::string_view bytes;
    uint32_t id, check;  // of the hash
  };
  std::vector<Slot> slots_;
};

struct Merge {
  uint32_t left, right, result, rank;
};

// Rank, then result: the order of merges. Equal ranks have equal results.
constexpr uint64_t kNoMerge = UINT64_MAX;
constexpr uint32_t kMaxRank = (1 << 24) - 1;

// (left, right) -> rank << 32 | result.
class MergeTable {
 public:
  explicit MergeTable(const std::vector<Merge>& merges);
  // kNoMerge if the two do not merge.
  uint64_t find(uint32_t left, uint32_t right) const {
    const uint64_t pair = static_cast<uint64_t>(left) << 32 | right;
    const uint64_t bit = hash(pair) >> (shift_ - 3);
    if ((filter_[bit / 64] >> bit % 64 & 1) == 0) return kNoMerge;
    size_t i = hash(pair) >> shift_;
    while (entries_[i].pair != pair && entries_[i].merge != kNoMerge) i = (i + 1) & mask_;
    return entries_[i].merge;
  }

 private:
  struct Entry {
    uint64_t pair, merge;
  };
  static uint64_t hash(uint64_t pair) { return pair * 0x9E3779B97F4A7C15u; }
  std::vector<Entry> entries_;
  std::vector<uint64_t> filter_;  // eight bits an entry, by the upper bits of the hash: most pairs do not merge
  size_t mask_;
  int shift_;
};

class Encoder {
 public:
  // tokens: id and bytes of each, special tokens too; the ids of special tokens are never the result of a merge.
  // byte_ids: the token of each byte, or kNoId.
  // any_split: merge any two tokens that together are a token, and take the id for the rank (tiktoken's rule);
  // `merges` is then empty. A whole piece that is a token is then that token, whatever its merges say.
  Encoder(const std::vector<std::pair<uint32_t, std::string>>& tokens, const std::array<uint32_t, 256>& byte_ids,
          std::vector<Merge> merges, bool any_split, std::vector<std::string> specials,
          std::vector<uint32_t> special_ids, Splitter splitter);
  ~Encoder();

  // The ids of all texts one after the other, in a few parts: the special tokens of `allowed` as such and everything
  // else as ordinary text. Writes how many ids each text has to `counts`. The parts do not depend on where a text ends,
  // so a long one keeps all threads busy too. Throws std::invalid_argument for a byte that has no token.
  std::vector<Ids> encode_batch(std::span<const std::string_view> texts, const TokenSet& allowed, size_t num_threads,
                                size_t* counts) const;
  // Appends the ids of text already cut.
  void encode_segments(std::string_view text, const Segment* segments, size_t count, Ids& out) const;
  // The ids of one piece, by merges of a rank lower than `below` alone. Returns how many; out has room for
  // piece.size().
  // Throws std::invalid_argument for a byte that has no token.
  size_t merge_piece(std::string_view piece, uint32_t below, uint32_t* out) const;
  bool has_bytes(std::string_view piece) const;

  // The bytes that ids stand for. Throws std::invalid_argument for an id that has no token.
  size_t decoded_size(const uint32_t* ids, size_t count) const;
  // Writes them to [out, end).
  void decode(const uint32_t* ids, size_t count, char* out, const char* end) const;
  [[noreturn]] void refuse(const std::string& id) const;

  const TokenBytes& tokens() const { return tokens_; }
  const SpecialTokens& specials() const { return specials_; }
  const Splitter& splitter() const { return splitter_; }

 private:
  class Lease;
  void encode_segment(WordCache& cache, std::string_view text, const Segment& segment, Ids& out) const;
  void encode_ordinary(WordCache& cache, std::string_view text, Ids& out) const;
  struct Lookup {  // of one piece
    uint64_t lo, hi, hash;
    const void* line;
    ShortWord word() const { return {lo, hi}; }
  };
  size_t encode_piece(WordCache& cache, std::string_view piece, const Lookup& lookup, uint32_t* out) const;
  size_t merge_few(const uint8_t* piece, size_t size, uint32_t below, uint32_t* out) const;
  size_t merge_many(const uint8_t* piece, size_t size, uint32_t below, uint32_t* out) const;
  uint32_t byte_id(uint8_t byte) const;
  void collect_whole_words(size_t num_tokens, bool any_split);
  uint32_t whole_word(const ShortWord& word, uint64_t hash) const;

  TokenBytes tokens_;
  std::array<uint32_t, 256> byte_ids_;
  MergeTable merges_{{}};
  std::vector<uint64_t> byte_merges_;  // the merge of each two bytes, left * 256 + right
  SpecialTokens specials_;
  std::vector<uint32_t> special_ids_;
  Splitter splitter_;

  // Pieces that are one token.
  struct WholeWord {
    ShortWord word;
    uint32_t id;
  };
  std::vector<WholeWord> short_words_;
  size_t short_mask_ = 0;
  TokenIndex long_words_;

  // Caches at rest; a call takes one out and puts it back, without a lock.
  mutable std::array<std::atomic<WordCache*>, 256> caches_{};
};

}  // namespace cs336::text
