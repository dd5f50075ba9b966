// Byte-level BPE: text to token ids and back.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cpu/text/bpe_merge.h"
#include "cpu/text/pretokenize.h"
#include "cpu/text/special.h"
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

class Encoder {
 public:
  // tokens: id and bytes of each, special tokens too; the ids of special tokens are never the result of a merge.
  // byte_ids: the token of each byte, or kNoId.
  // any_split: merge any two tokens that together are a token, and take the id for the rank (tiktoken's rule);
  // `merges` is then empty. A whole piece that is a token is then that token, whatever its merges say.
  Encoder(const Tokens& tokens, const std::array<uint32_t, 256>& byte_ids, const std::vector<Merge>& merges,
          bool any_split, std::vector<std::string> specials, std::vector<uint32_t> special_ids, Splitter splitter);
  ~Encoder();

  // The ids of all texts one after the other, in a few parts: the special tokens of `allowed` as such and everything
  // else as ordinary text. Writes how many ids each text has to `counts`. The parts do not depend on where a text ends,
  // so a long one keeps all threads busy too. Throws std::invalid_argument for a byte that has no token.
  std::vector<Ids> encode_batch(std::span<const std::string_view> texts, const TokenSet& allowed, size_t num_threads,
                                size_t* counts) const;
  // Appends the ids of text already cut.
  void encode_segments(std::string_view text, const Segment* segments, size_t count, Ids& out) const;
  // The bytes that ids stand for. Throws std::invalid_argument for an id that has no token.
  size_t decoded_size(const uint32_t* ids, size_t count) const;
  // Writes them to [out, end).
  void decode(const uint32_t* ids, size_t count, char* out, const char* end) const;
  [[noreturn]] void refuse(const std::string& id) const;

  const TokenBytes& tokens() const { return tokens_; }
  const Merger& merger() const { return merger_; }
  const SpecialTokens& specials() const { return specials_; }
  const Splitter& splitter() const { return splitter_; }

 private:
  class Lease;
  void encode_segment(WordCache& cache, std::string_view text, const Segment& segment, Ids& out) const;
  void encode_ordinary(WordCache& cache, std::string_view text, Ids& out) const;
  struct Lookup {  // of one piece
    Lookup() = default;
    Lookup(std::string_view piece, const char* limit) {
      if (piece.size() <= kMaxShort) {
        word = pack_word(piece.data(), piece.size(), limit);
        hash = hash_word(word);
      } else {
        hash = piece.size() <= WordCache::kLongBytes ? hash_bytes(piece) : 0;
      }
    }
    ShortWord word;
    uint64_t hash;
    const void* line;
  };
  size_t encode_piece(WordCache& cache, std::string_view piece, const Lookup& lookup, uint32_t* out) const;

  TokenBytes tokens_;
  SpecialTokens specials_;
  std::vector<uint32_t> special_ids_;
  Splitter splitter_;
  Merger merger_;
  WordCache whole_words_;  // what each cache begins with: the pieces that are one token
  std::unordered_map<std::string_view, uint32_t> very_long_;  // those with more bytes than a cache keeps

  // Caches at rest; a call takes one out and puts it back, without a lock.
  mutable std::array<std::atomic<WordCache*>, 256> caches_{};
};

}  // namespace cs336::text
