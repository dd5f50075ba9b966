#include "cpu/text/bpe_encode.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>

namespace cs336::text {
Encoder::Lease::Lease(const Encoder& encoder) : encoder_(encoder) {
  for (auto& slot : encoder_.caches_) {
    if (slot.load(std::memory_order_relaxed) == nullptr) continue;
    cache_.reset(slot.exchange(nullptr, std::memory_order_acquire));
    if (cache_) return;
  }
  cache_ = std::make_unique<WordCache>(encoder.whole_words_);
}

Encoder::Lease::~Lease() {
  for (auto& slot : encoder_.caches_) {
    WordCache* none = nullptr;
    if (slot.compare_exchange_strong(none, cache_.get(), std::memory_order_release)) {
      cache_.release();
      return;
    }
  }
}

Encoder::Encoder(const Tokens& tokens, const std::vector<uint32_t>& ordinary, const Alphabet& alphabet,
                 const std::vector<Merge>& merges, bool any_split, SpecialTokens specials,
                 std::vector<uint32_t> special_ids, Splitter splitter, FrontSpace front)
    : tokens_(tokens),
      specials_(std::move(specials)),
      special_ids_(std::move(special_ids)),
      splitter_(std::move(splitter)),
      front_(front),
      merger_(any_split ? Merger(tokens_, alphabet, ordinary) : Merger(tokens_, alphabet, merges)),
      rows_(tokens_.size()) {
  std::vector<uint32_t> ids;
  for (const uint32_t id : ordinary) {
    const std::string_view bytes = tokens_[id];
    if (!any_split) {
      ids.resize(bytes.size());
      if (!merger_.has_bytes(bytes) || merger_.merge(bytes, kNoRank, ids.data()) != 1 || ids[0] != id) continue;
    }
    if (bytes.size() > WordCache::kLongBytes) {
      very_long_.emplace(bytes, id);
    } else {
      const ShortWord key = WordCache::key_of(bytes.data(), bytes.size(), bytes.data() + bytes.size());
      whole_words_.widen();
      whole_words_.reserve(1);
      whole_words_.put(bytes, key, &id, 1);
    }
  }
  whole_words_.widen();
  for (const auto& [id, bytes] : tokens) {
    Row& row = rows_[id];
    row.size = static_cast<uint8_t>(std::min(bytes.size(), Row::kMost + 1));
    std::memcpy(row.bytes, bytes.data(), std::min(bytes.size(), Row::kMost));
  }
}

Encoder::~Encoder() {
  for (auto& slot : caches_) delete slot.load();
}

// A piece that is not where it is first looked for, and may not be in the cache at all.
template <class Id>
size_t Encoder::encode_piece(WordCache& cache, std::string_view piece, const ShortWord& key, Id* out) const {
  if (piece.size() > WordCache::kLongBytes) {
    if (const auto whole = very_long_.find(piece); whole != very_long_.end()) {
      out[0] = static_cast<Id>(whole->second);
      return 1;
    }
    std::vector<uint32_t> ids(piece.size());
    const size_t count = merger_.merge(piece, kNoRank, ids.data());
    std::copy_n(ids.data(), count, out);
    return count;
  }
  if (const size_t count = cache.find(piece, key, out)) return count;
  std::array<uint32_t, WordCache::kLongBytes> ids;
  const size_t count = merger_.merge(piece, kNoRank, ids.data());
  cache.put(piece, key, ids.data(), count);
  std::copy_n(ids.data(), count, out);
  return count;
}

// Batch by batch: first ask for the memory of all words, then look at it.
template <class Id>
void Encoder::encode_ordinary(WordCache& cache, std::string_view text, Buffer<Id>& out) const {
  const char* const limit = text.data() + text.size();
  struct Lookup {
    ShortWord key;
    const void* line;
  };
  std::array<Lookup, Splitter::kBatch> lookups;
  splitter_.for_each_batch(text, [&](size_t begin, const size_t* ends, size_t count) {
    if (!cache.reserve(count)) {
      cache = whole_words_;
      cache.reserve(count);
    }
    Lookup* lookup = lookups.data();
    const char* piece = text.data() + begin;
    for (const size_t* end = ends; end != ends + count; ++end, ++lookup) {
      const char* const after = text.data() + *end;
      const auto size = static_cast<size_t>(after - piece);
      lookup->key = WordCache::key_of(piece, size, limit);
      lookup->line = cache.line_of(lookup->key, size);
      __builtin_prefetch(lookup->line);
      piece = after;
    }
    Id* const first = out.room(ends[count - 1] - begin + WordCache::kShortIds);
    Id* next = first;
    const Lookup* const last = lookup;
    for (lookup = lookups.data(); lookup != last; ++lookup) {
      const ShortWord& key = lookup->key;
      size_t found = 0;
      if (WordCache::size_of(key) <= WordCache::kTinyBytes) {
        found = WordCache::find_tiny(lookup->line, key, next);
      } else if (WordCache::size_of(key) <= kMaxShort) {
        found = WordCache::find_short(lookup->line, key, next);
      }
      if (found == 0) [[unlikely]] {
        const size_t i = lookup - lookups.data(), start = i == 0 ? begin : ends[i - 1];
        found = encode_piece(cache, text.substr(start, ends[i] - start), key, next);
      }
      next += found;
    }
    out.advance(static_cast<size_t>(next - first));
  });
}

// Spaces may be written as marks: then `text` becomes that of `copy`, which has spaces for them.
std::string Encoder::take_first(std::string_view& text, After after, std::string& copy) const {
  if (memmem(text.data(), text.size(), kSpaceMarkUtf8.data(), kSpaceMarkUtf8.size()) != nullptr) {
    for (size_t at = 0; at < text.size();) {
      const size_t mark = std::min(text.find(kSpaceMarkUtf8, at), text.size());
      copy.append(text, at, mark - at);
      if (mark < text.size()) copy += ' ';
      at = mark + kSpaceMarkUtf8.size();
    }
    text = copy;
  }
  const bool begins = after == After::kNothing || (after == After::kSpecial && front_.prefix == Prefix::kEach);
  if (!begins || front_.prefix == Prefix::kNone || (text[0] == ' ' && !front_.doubled)) return {};
  size_t end;
  splitter_.joints()->split(text, 0, &end, 1);
  std::string first = " ";
  first.append(text, 0, end);
  text.remove_prefix(end);
  return first;
}

template <class Id>
void Encoder::encode_segment(WordCache& cache, std::string_view text, const Segment& segment, Buffer<Id>& out) const {
  if (segment.special != kNotFound) {
    *out.room(1) = static_cast<Id>(special_ids_[segment.special]);
    out.advance(1);
    return;
  }
  std::string_view rest = text.substr(segment.begin, segment.end - segment.begin);
  std::string first, copy;
  if (splitter_.joints() != nullptr) first = take_first(rest, segment.after, copy);
  const std::array<std::string_view, 2> parts = {first, rest};
  for (size_t i = first.empty() ? 1 : 0; i < parts.size(); ++i) encode_ordinary(cache, parts[i], out);
}

template <class Id>
void Encoder::encode_segments(const Lease& cache, std::string_view text, const Segment* segments, size_t count,
                              Buffer<Id>& out) const {
  for (const Segment& s : std::span(segments, count)) encode_segment(*cache, text, s, out);
}
template void Encoder::encode_segments(const Lease&, std::string_view, const Segment*, size_t, Buffer<uint16_t>&) const;
template void Encoder::encode_segments(const Lease&, std::string_view, const Segment*, size_t, Buffer<uint32_t>&) const;

template <class Id>
void Encoder::encode_batch(const Lease& cache, std::span<const std::string_view> texts, const TokenSet& allowed,
                           size_t after, size_t* counts, Buffer<Id>& out) const {
  std::vector<Segment> segments;
  for (const std::string_view text : texts) {
    segments.clear();
    cut(text, true, kNotFound, splitter_, specials_, allowed, segments);
    if (after != kNotFound) segments.push_back({text.size(), text.size(), after});
    const size_t before = out.size();
    encode_segments(cache, text, segments.data(), segments.size(), out);
    *counts++ = out.size() - before;
  }
}
template void Encoder::encode_batch(const Lease&, std::span<const std::string_view>, const TokenSet&, size_t, size_t*,
                                    Buffer<uint16_t>&) const;
template void Encoder::encode_batch(const Lease&, std::span<const std::string_view>, const TokenSet&, size_t, size_t*,
                                    Buffer<uint32_t>&) const;

void Encoder::refuse(const std::string& id) const {
  throw std::invalid_argument("id " + id + " is not in the vocabulary, whose ids are below " +
                              std::to_string(tokens_.size()));
}

template <class Id>
void Encoder::decode(const Id* ids, size_t count, Buffer<char>& out) const {
  constexpr size_t kSome = 4096;
  PollEvery<64> poll;
  for (size_t some; count > 0; ids += some, count -= some, poll()) {
    some = std::min(count, kSome);
    char* next = out.room(some * sizeof(Row));
    const auto flush = [&] { out.advance(static_cast<size_t>(next - (out.data() + out.size()))); };
    for (size_t i = 0; i < some; ++i) {
      const Id id = ids[i];
      if (static_cast<uint64_t>(id) >= rows_.size()) refuse(std::to_string(id));
      const Row& row = rows_[static_cast<uint64_t>(id)];
      std::memcpy(next, &row, sizeof(Row));
      if (row.size <= Row::kMost) [[likely]] {
        if (row.size == 0) refuse(std::to_string(id));
        next += row.size;
        continue;
      }
      const std::string_view token = tokens_[static_cast<uint32_t>(id)];
      flush();
      next = out.room((some - i) * sizeof(Row) + token.size());
      next = std::copy(token.begin(), token.end(), next);
    }
    flush();
  }
}
template void Encoder::decode(const uint16_t*, size_t, Buffer<char>&) const;
template void Encoder::decode(const uint32_t*, size_t, Buffer<char>&) const;
template void Encoder::decode(const int64_t*, size_t, Buffer<char>&) const;
template void Encoder::decode(const uint64_t*, size_t, Buffer<char>&) const;

}  // namespace cs336::text
