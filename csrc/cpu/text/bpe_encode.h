// BPE: text to token ids and back.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cpu/text/bpe_merge.h"
#include "cpu/text/huge_pages.h"
#include "cpu/text/pretokenize.h"
#include "cpu/text/special.h"
#include "cpu/text/word_cache.h"

namespace cs336::text {

// Where a space goes that the text does not have: before its start alone, or after each special token too.
enum class Prefix : uint8_t { kNone, kFirst, kEach };
struct FrontSpace {
  Prefix prefix = Prefix::kNone;
  bool doubled = false;  // also before a text that begins with one
};

class Encoder {
 public:
  // tokens: id and bytes of each, special tokens too.
  // ordinary: the ids of those that text may merge to, ascending.
  // any_split: merge any two tokens that together are a token, and take the id for the rank (tiktoken's rule);
  // `merges` is then empty. A whole piece that is a token is then that token, whatever its merges say.
  Encoder(const Tokens& tokens, const std::vector<uint32_t>& ordinary, const Alphabet& alphabet,
          const std::vector<Merge>& merges, bool any_split, SpecialTokens specials, std::vector<uint32_t> special_ids,
          Splitter splitter, FrontSpace front = {});
  ~Encoder();

  // A cache of words for one thread, taken out of those at rest, or made where all are in use. A thread keeps it for as
  // long as it encodes: a cache that goes from one core to the other is slow.
  class Lease {
   public:
    explicit Lease(const Encoder& encoder);
    ~Lease();
    Lease(const Lease&) = delete;
    WordCache& operator*() const { return *cache_; }

   private:
    const Encoder& encoder_;
    std::unique_ptr<WordCache> cache_;
  };

  // Appends the ids of all texts, one after the other. The special tokens of `allowed` count as such and everything
  // else as ordinary text, and the special token `after` (an index, or kNotFound) comes behind each text. Writes how
  // many ids each text has to `counts`. Throws std::invalid_argument for a byte that has no token. Id: uint32_t, or
  // uint16_t where it holds all ids.
  template <class Id>
  void encode_batch(const Lease& cache, std::span<const std::string_view> texts, const TokenSet& allowed, size_t after,
                    size_t* counts, Buffer<Id>& out) const;
  // Appends the ids of text already cut.
  template <class Id>
  void encode_segments(const Lease& cache, std::string_view text, const Segment* segments, size_t count,
                       Buffer<Id>& out) const;
  // Appends the bytes that ids stand for. Throws std::invalid_argument for an id that has no token. Reads each id once:
  // another thread may be writing them.
  // Id: uint16_t, uint32_t, int64_t or uint64_t.
  template <class Id>
  void decode(const Id* ids, size_t count, Buffer<char>& out) const;
  [[noreturn]] void refuse(const std::string& id) const;

  const TokenBytes& tokens() const { return tokens_; }
  const Merger& merger() const { return merger_; }
  const SpecialTokens& specials() const { return specials_; }
  const Splitter& splitter() const { return splitter_; }

 private:
  // A token to decode, on one cache line: copied whole, whatever its size. One that does not fit has kMost + 1 for its
  // size, and an id that is no token has 0.
  struct alignas(16) Row {
    static constexpr size_t kMost = 15;
    char bytes[kMost] = {};
    uint8_t size = 0;
  };
  template <class Id>
  void encode_segment(WordCache& cache, std::string_view text, const Segment& segment, Buffer<Id>& out) const;
  // By characters: takes the first piece off a text that a space goes before, and returns both together.
  std::string take_first(std::string_view& text, After after, std::string& copy) const;
  template <class Id>
  void encode_ordinary(WordCache& cache, std::string_view text, Buffer<Id>& out) const;
  template <class Id>
  size_t encode_piece(WordCache& cache, std::string_view piece, const ShortWord& key, Id* out) const;

  TokenBytes tokens_;
  SpecialTokens specials_;
  std::vector<uint32_t> special_ids_;
  Splitter splitter_;
  FrontSpace front_;
  Merger merger_;
  WordCache whole_words_;  // what each cache begins with: the pieces that are one token
  std::unordered_map<std::string_view, uint32_t> very_long_;  // those with more bytes than a cache keeps
  TableVector<Row> rows_;                                     // by id

  // Caches at rest; a call takes one out and puts it back, without a lock.
  mutable std::array<std::atomic<WordCache*>, 256> caches_{};
};

}  // namespace cs336::text
