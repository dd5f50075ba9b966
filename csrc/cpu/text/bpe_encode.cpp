#include "cpu/text/bpe_encode.h"

#include <algorithm>
#include <span>
#include <stdexcept>
#include <unordered_set>

#include "cpu/text/parallel.h"

namespace cs336::text {
namespace {

constexpr size_t kPartSize = 256 << 10;  // bytes of text that one thread takes at a time

// Ascending.
std::vector<uint32_t> ordinary_ids(const Tokens& tokens, const std::vector<uint32_t>& special_ids) {
  const std::unordered_set<uint32_t> special(special_ids.begin(), special_ids.end());
  std::vector<uint32_t> ids;
  for (const auto& [id, bytes] : tokens) {
    if (!special.contains(id)) ids.push_back(id);
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

}  // namespace

Ids& Ids::operator=(Ids&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(capacity_, other.capacity_);
  return *this;
}

void Ids::grow(size_t least) {
  const size_t capacity = std::max<size_t>({least, capacity_ * 2, 64});
  void* data = std::realloc(data_, capacity * sizeof(uint32_t));
  if (data == nullptr) throw std::bad_alloc();
  data_ = static_cast<uint32_t*>(data);
  capacity_ = capacity;
}

// Takes a cache out for one call, a new one where all are in use.
class Encoder::Lease {
 public:
  explicit Lease(const Encoder& encoder) : encoder_(encoder) {
    for (auto& slot : encoder_.caches_) {
      if (slot.load(std::memory_order_relaxed) == nullptr) continue;
      cache_.reset(slot.exchange(nullptr, std::memory_order_acquire));
      if (cache_) return;
    }
    cache_ = std::make_unique<WordCache>(encoder.whole_words_);
  }
  ~Lease() {
    for (auto& slot : encoder_.caches_) {
      WordCache* none = nullptr;
      if (slot.compare_exchange_strong(none, cache_.get(), std::memory_order_release)) {
        cache_.release();
        return;
      }
    }
  }
  Lease(const Lease&) = delete;
  WordCache& operator*() const { return *cache_; }

 private:
  const Encoder& encoder_;
  std::unique_ptr<WordCache> cache_;
};

Encoder::Encoder(const Tokens& tokens, const std::array<uint32_t, 256>& byte_ids, const std::vector<Merge>& merges,
                 bool any_split, std::vector<std::string> specials, std::vector<uint32_t> special_ids,
                 Splitter splitter)
    : tokens_(tokens),
      specials_(std::move(specials)),
      special_ids_(std::move(special_ids)),
      splitter_(std::move(splitter)),
      merger_(any_split ? Merger(tokens_, byte_ids, ordinary_ids(tokens, special_ids_))
                        : Merger(tokens_, byte_ids, merges)) {
  std::vector<uint32_t> ids;
  for (const uint32_t id : ordinary_ids(tokens, special_ids_)) {
    const std::string_view bytes = tokens_[id];
    if (!any_split) {
      ids.resize(bytes.size());
      if (!merger_.has_bytes(bytes) || merger_.merge(bytes, kNoRank, ids.data()) != 1 || ids[0] != id) continue;
    }
    if (bytes.size() > WordCache::kLongBytes) {
      very_long_.emplace(bytes, id);
    } else {
      const Lookup lookup(bytes, bytes.data() + bytes.size());
      whole_words_.widen();
      whole_words_.reserve(1);
      whole_words_.put(bytes, lookup.word, lookup.hash, &id, 1);
    }
  }
  whole_words_.widen();
}

Encoder::~Encoder() {
  for (auto& slot : caches_) delete slot.load();
}

// A piece that is not where it is first looked for, and may not be in the cache at all.
size_t Encoder::encode_piece(WordCache& cache, std::string_view piece, const Lookup& lookup, uint32_t* out) const {
  if (piece.size() > WordCache::kLongBytes) {
    const auto whole = very_long_.find(piece);
    if (whole == very_long_.end()) return merger_.merge(piece, kNoRank, out);
    out[0] = whole->second;
    return 1;
  }
  size_t count = cache.find(piece, lookup.word, lookup.hash, out);
  if (count == 0) {
    count = merger_.merge(piece, kNoRank, out);
    cache.put(piece, lookup.word, lookup.hash, out, count);
  }
  return count;
}

// Batch by batch: first ask for the memory of all words, then look at it.
void Encoder::encode_ordinary(WordCache& cache, std::string_view text, Ids& out) const {
  const char* limit = text.data() + text.size();
  std::array<Lookup, Splitter::kBatch> lookups;
  splitter_.for_each_batch(text, [&](size_t begin, const size_t* ends, size_t count) {
    if (!cache.reserve(count)) {
      cache = whole_words_;
      cache.reserve(count);
    }
    for (size_t i = 0, start = begin; i < count; start = ends[i++]) {
      const size_t size = ends[i] - start;
      Lookup& lookup = lookups[i];
      lookup = Lookup(text.substr(start, size), limit);
      lookup.line = cache.line_of(lookup.hash, size);
      __builtin_prefetch(lookup.line);
    }
    uint32_t* const first = out.room(ends[count - 1] - begin + WordCache::kShortIds);
    uint32_t* next = first;
    for (size_t i = 0; i < count; begin = ends[i++]) {
      const Lookup& lookup = lookups[i];
      const size_t size = ends[i] - begin;
      size_t found = 0;
      if (size <= WordCache::kTinyBytes) {
        found = WordCache::find_tiny(lookup.line, lookup.word, next);
      } else if (size <= kMaxShort) {
        found = WordCache::find_short(lookup.line, lookup.word, next);
      }
      if (found == 0) [[unlikely]]
        found = encode_piece(cache, text.substr(begin, size), lookup, next);
      next += found;
    }
    out.advance(static_cast<size_t>(next - first));
  });
}

void Encoder::encode_segments(std::string_view text, const Segment* segments, size_t count, Ids& out) const {
  const Lease cache(*this);
  for (const Segment& s : std::span(segments, count)) encode_segment(*cache, text, s, out);
}

void Encoder::encode_segment(WordCache& cache, std::string_view text, const Segment& segment, Ids& out) const {
  if (segment.special != kNotFound) {
    out.push(special_ids_[segment.special]);
  } else {
    encode_ordinary(cache, text.substr(segment.begin, segment.end - segment.begin), out);
  }
}

std::vector<Ids> Encoder::encode_batch(std::span<const std::string_view> texts, const TokenSet& allowed,
                                       size_t num_threads, size_t* counts) const {
  // Neighbouring segments, of whichever texts, go together into parts of about one size.
  std::vector<Segment> segments;
  std::vector<size_t> text_of, parts{0};
  size_t bytes = 0;
  for (size_t i = 0; i < texts.size(); ++i) {
    cut(texts[i], true, num_threads > 1 ? kPartSize : kNotFound, splitter_, specials_, allowed, segments);
    for (size_t k = text_of.size(); k < segments.size(); ++k) {
      text_of.push_back(i);
      bytes += segments[k].end - segments[k].begin;
      if (num_threads == 1 || bytes < kPartSize) continue;
      parts.push_back(k + 1);
      bytes = 0;
    }
  }
  if (parts.back() < segments.size()) parts.push_back(segments.size());

  std::vector<Ids> ids(parts.size() - 1);
  std::vector<size_t> segment_counts(segments.size());
  parallel_for(ids.size(), num_threads, [&](size_t part, size_t) {
    const Lease cache(*this);
    for (size_t k = parts[part]; k < parts[part + 1]; ++k) {
      const size_t before = ids[part].size();
      encode_segment(*cache, texts[text_of[k]], segments[k], ids[part]);
      segment_counts[k] = ids[part].size() - before;
    }
  });
  std::fill_n(counts, texts.size(), 0);
  for (size_t k = 0; k < segments.size(); ++k) counts[text_of[k]] += segment_counts[k];
  return ids;
}

void Encoder::refuse(const std::string& id) const {
  throw std::invalid_argument("id " + id + " is not in the vocabulary, whose ids are below " +
                              std::to_string(tokens_.size()));
}

size_t Encoder::decoded_size(const uint32_t* ids, size_t count) const {
  size_t size = 0;
  for (size_t i = 0; i < count; ++i) {
    if (!tokens_.contains(ids[i])) refuse(std::to_string(ids[i]));
    size += tokens_[ids[i]].size();
  }
  return size;
}

void Encoder::decode(const uint32_t* ids, size_t count, char* out, const char* end) const {
  for (size_t i = 0; i < count; ++i) {
    const std::string_view token = tokens_[ids[i]];
    if (token.size() <= TokenBytes::kPadding && end - out >= ptrdiff_t{TokenBytes::kPadding}) {
      std::memcpy(out, token.data(), TokenBytes::kPadding);
    } else {
      std::memcpy(out, token.data(), token.size());
    }
    out += token.size();
  }
}

}  // namespace cs336::text
