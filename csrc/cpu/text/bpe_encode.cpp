#include "cpu/text/bpe_encode.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <queue>
#include <span>
#include <stdexcept>
#include <unordered_set>

#include "cpu/text/parallel.h"

namespace cs336::text {
namespace {

constexpr size_t kFew = 64;              // bytes of a piece up to which a scan for the next merge beats a heap
constexpr size_t kPartSize = 256 << 10;  // bytes of text that one thread takes at a time

using Tokens = std::vector<std::pair<uint32_t, std::string>>;

// Every way to make an ordinary token of two others.
std::vector<Merge> all_splits(const Tokens& tokens, const std::vector<uint32_t>& special_ids) {
  TokenIndex index(tokens.size());
  const std::unordered_set<uint32_t> special(special_ids.begin(), special_ids.end());
  size_t longest = 0;
  for (const auto& [id, bytes] : tokens) {
    if (special.contains(id)) continue;
    index.add(bytes, id);
    longest = std::max(longest, bytes.size());
  }
  std::vector<bool> has_size(longest + 1);
  index.for_each([&](std::string_view bytes, uint32_t) { has_size[bytes.size()] = true; });
  std::vector<Merge> merges;
  index.for_each([&](std::string_view bytes, uint32_t id) {
    for (size_t size = 1; size < bytes.size(); ++size) {
      if (!has_size[size] || !has_size[bytes.size() - size]) continue;
      const uint32_t left = index.find(bytes.substr(0, size));
      if (left == kNoId) continue;
      const uint32_t right = index.find(bytes.substr(size));
      if (right != kNoId) merges.push_back({left, right, id, id});
    }
  });
  return merges;
}

// Of `count` keys, a multiple of eight.
inline int32_t smallest(const int32_t* keys, size_t count) {
  int32_t lanes[8];
  std::copy_n(keys, 8, lanes);
  for (size_t i = 8; i < count; i += 8) {
    for (size_t k = 0; k < 8; ++k) lanes[k] = std::min(lanes[k], keys[i + k]);
  }
  for (size_t width = 4; width > 0; width /= 2) {
    for (size_t k = 0; k < width; ++k) lanes[k] = std::min(lanes[k], lanes[k + width]);
  }
  return lanes[0];
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

TokenBytes::TokenBytes(const Tokens& tokens) {
  uint32_t last = 0;
  for (const auto& [id, bytes] : tokens) last = std::max(last, id);
  offsets_.resize(size_t{last} + 2);
  for (const auto& [id, bytes] : tokens) offsets_[id + 1] = bytes.size();
  for (size_t i = 1; i < offsets_.size(); ++i) offsets_[i] += offsets_[i - 1];
  bytes_.resize(offsets_.back() + kPadding);
  for (const auto& [id, bytes] : tokens) std::copy(bytes.begin(), bytes.end(), bytes_.begin() + offsets_[id]);
}

void TokenIndex::add(std::string_view bytes, uint32_t id) {
  const uint64_t hash = hash_bytes(bytes);
  size_t i = hash & (slots_.size() - 1);
  while (slots_[i].id != kNoId) i = (i + 1) & (slots_.size() - 1);
  slots_[i] = {bytes, id, static_cast<uint32_t>(hash >> 32)};
}

uint32_t TokenIndex::find(std::string_view bytes) const {
  const uint64_t hash = hash_bytes(bytes);
  for (size_t i = hash & (slots_.size() - 1);; i = (i + 1) & (slots_.size() - 1)) {
    const Slot& slot = slots_[i];
    if (slot.id == kNoId || (slot.check == hash >> 32 && slot.bytes == bytes)) return slot.id;
  }
}

MergeTable::MergeTable(const std::vector<Merge>& merges) {
  const size_t capacity = std::bit_ceil(std::max<size_t>(merges.size() * 2, 16));
  entries_.assign(capacity, {0, kNoMerge});
  filter_.assign(capacity / 8, 0);
  mask_ = capacity - 1;
  shift_ = 64 - std::countr_zero(capacity);
  for (const Merge& m : merges) {
    if (m.rank > kMaxRank) throw std::length_error("there may be at most 2**24 merges");
    const uint64_t pair = static_cast<uint64_t>(m.left) << 32 | m.right;
    const uint64_t bit = hash(pair) >> (shift_ - 3);
    filter_[bit / 64] |= uint64_t{1} << bit % 64;
    size_t i = hash(pair) >> shift_;
    while (entries_[i].merge != kNoMerge && entries_[i].pair != pair) i = (i + 1) & mask_;
    if (entries_[i].merge != kNoMerge) continue;  // the first of a merge listed twice
    entries_[i] = {pair, static_cast<uint64_t>(m.rank) << 32 | m.result};
  }
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
    cache_ = std::make_unique<WordCache>();
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

Encoder::Encoder(const Tokens& tokens, const std::array<uint32_t, 256>& byte_ids, std::vector<Merge> merges,
                 bool any_split, std::vector<std::string> specials, std::vector<uint32_t> special_ids,
                 Splitter splitter)
    : tokens_(tokens),
      byte_ids_(byte_ids),
      specials_(std::move(specials)),
      special_ids_(std::move(special_ids)),
      splitter_(std::move(splitter)),
      long_words_(tokens.size()) {
  if (any_split) merges = all_splits(tokens, special_ids_);
  merges_ = MergeTable(merges);
  byte_merges_.assign(1 << 16, kNoMerge);
  for (const Merge& m : merges) {
    const std::string_view left = tokens_[m.left], right = tokens_[m.right];
    if (left.size() != 1 || right.size() != 1) continue;
    byte_merges_[static_cast<uint8_t>(left[0]) << 8 | static_cast<uint8_t>(right[0])] = merges_.find(m.left, m.right);
  }
  collect_whole_words(tokens.size(), any_split);
}

Encoder::~Encoder() {
  for (auto& slot : caches_) delete slot.load();
}

void Encoder::collect_whole_words(size_t num_tokens, bool any_split) {
  const size_t capacity = std::bit_ceil(num_tokens * 2 + 1);
  short_words_.assign(capacity, {{}, kNoId});
  short_mask_ = capacity - 1;
  std::vector<bool> is_special(tokens_.size());
  for (const uint32_t id : special_ids_) is_special[id] = true;
  std::vector<uint32_t> ids;
  for (uint32_t id = 0; id < tokens_.size(); ++id) {
    if (!tokens_.contains(id) || is_special[id]) continue;
    const std::string_view bytes = tokens_[id];
    if (!any_split) {
      ids.resize(bytes.size());
      if (!has_bytes(bytes) || merge_piece(bytes, kNoId, ids.data()) != 1 || ids[0] != id) continue;
    }
    if (bytes.size() > kMaxShort) {
      long_words_.add(bytes, id);
      continue;
    }
    const ShortWord word = pack_word(bytes.data(), bytes.size(), bytes.data() + bytes.size());
    size_t i = hash_word(word) & short_mask_;
    while (short_words_[i].id != kNoId) i = (i + 1) & short_mask_;
    short_words_[i] = {word, id};
  }
}

uint32_t Encoder::whole_word(const ShortWord& word, uint64_t hash) const {
  size_t i = hash & short_mask_;
  while (short_words_[i].id != kNoId && short_words_[i].word != word) i = (i + 1) & short_mask_;
  return short_words_[i].id;
}

bool Encoder::has_bytes(std::string_view piece) const {
  return std::all_of(piece.begin(), piece.end(), [&](char c) { return byte_ids_[static_cast<uint8_t>(c)] != kNoId; });
}

uint32_t Encoder::byte_id(uint8_t byte) const {
  const uint32_t id = byte_ids_[byte];
  if (id == kNoId) {
    char message[96];
    std::snprintf(message, sizeof(message), "the byte 0x%02X of the text is not in the vocabulary", byte);
    throw std::invalid_argument(message);
  }
  return id;
}

size_t Encoder::merge_piece(std::string_view piece, uint32_t below, uint32_t* out) const {
  const auto* bytes = reinterpret_cast<const uint8_t*>(piece.data());
  return piece.size() <= kFew ? merge_few(bytes, piece.size(), below, out)
                              : merge_many(bytes, piece.size(), below, out);
}

// Tokens lie at the place of their first byte, `alive` has a bit for each. A key is the rank of the merge of a token
// and the next, then its place: the smallest is the merge to do, the leftmost of equals.
size_t Encoder::merge_few(const uint8_t* piece, size_t size, uint32_t below, uint32_t* out) const {
  constexpr int32_t kNone = INT32_MAX;
  constexpr int kPlaceBits = 6;
  static_assert(kFew == 1 << kPlaceBits && kMaxRank << kPlaceBits < size_t{kNone});
  int32_t keys[kFew];
  uint32_t results[kFew];
  const auto set = [&](size_t i, uint64_t merge) {
    const auto rank = static_cast<uint32_t>(merge >> 32);
    results[i] = static_cast<uint32_t>(merge);
    keys[i] = rank < below ? static_cast<int32_t>(rank << kPlaceBits | i) : kNone;
  };
  for (size_t i = 0; i < size; ++i) out[i] = byte_id(piece[i]);
  for (size_t i = 0; i + 1 < size; ++i) set(i, byte_merges_[piece[i] << 8 | piece[i + 1]]);
  const size_t lanes = (size + 7) / 8 * 8;
  std::fill(keys + size - 1, keys + lanes, kNone);
  for (uint64_t alive = ~uint64_t{0} >> (kFew - size);;) {
    const int32_t best = smallest(keys, lanes);
    if (best == kNone) {
      size_t count = 0;
      for (; alive != 0; alive &= alive - 1) out[count++] = out[std::countr_zero(alive)];
      return count;
    }
    const size_t i = best & (kFew - 1);
    out[i] = results[i];
    uint64_t later = alive & ~uint64_t{1} << i;
    const int gone = std::countr_zero(later);
    later &= later - 1;
    alive ^= uint64_t{1} << gone;
    keys[gone] = keys[i] = kNone;
    if (later != 0) set(i, merges_.find(out[i], out[std::countr_zero(later)]));
    if (const uint64_t earlier = alive & ((uint64_t{1} << i) - 1); earlier != 0) {
      const size_t previous = 63 - std::countl_zero(earlier);
      set(previous, merges_.find(out[previous], out[i]));
    }
  }
}

// O(n log n): a heap of merges over a linked list of tokens.
size_t Encoder::merge_many(const uint8_t* piece, size_t size, uint32_t below, uint32_t* out) const {
  if (size >= kNoId) throw std::length_error("a piece of text without a break must be shorter than 4 GB");
  struct Node {
    uint32_t id, previous, next;
    uint64_t key;  // of the merge with the next
  };
  struct Candidate {
    uint64_t key;
    uint32_t position;
    bool operator>(const Candidate& o) const { return key != o.key ? key > o.key : position > o.position; }
  };
  std::vector<Node> nodes(size);
  std::vector<Candidate> candidates;
  const uint64_t limit = static_cast<uint64_t>(below) << 32;
  const auto last = static_cast<uint32_t>(size - 1);
  for (uint32_t i = 0; i <= last; ++i) nodes[i] = {byte_id(piece[i]), i - 1, i + 1, kNoMerge};
  for (uint32_t i = 0; i < last; ++i) {
    nodes[i].key = byte_merges_[piece[i] << 8 | piece[i + 1]];
    if (nodes[i].key < limit) candidates.push_back({nodes[i].key, i});
  }
  std::priority_queue queue(std::greater<Candidate>{}, std::move(candidates));
  const auto update = [&](uint32_t i) {
    Node& node = nodes[i];
    node.key = node.next <= last ? merges_.find(node.id, nodes[node.next].id) : kNoMerge;
    if (node.key < limit) queue.push({node.key, i});
  };
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Node& node = nodes[top.position];
    if (node.key != top.key) continue;  // one of the two has been merged since
    Node& gone = nodes[node.next];
    gone.key = kNoMerge;
    node.id = static_cast<uint32_t>(top.key);
    node.next = gone.next;
    if (node.next <= last) nodes[node.next].previous = top.position;
    update(top.position);
    if (top.position > 0) update(node.previous);
  }
  size_t count = 0;
  for (uint32_t i = 0; i <= last; i = nodes[i].next) out[count++] = nodes[i].id;
  return count;
}

// A piece that is not where it is first looked for, and may not be in the cache at all.
size_t Encoder::encode_piece(WordCache& cache, std::string_view piece, const Lookup& lookup, uint32_t* out) const {
  const bool is_short = piece.size() <= kMaxShort, is_cached = piece.size() <= WordCache::kLongBytes;
  if (is_cached) {
    if (const size_t count = cache.find(piece, lookup.word(), lookup.hash, out); count != 0) return count;
  }
  size_t count = 1;
  if (is_short) {
    out[0] = whole_word(lookup.word(), lookup.hash);
  } else {
    out[0] = long_words_.find(piece);
  }
  if (out[0] == kNoId) count = merge_piece(piece, kNoId, out);
  if (is_short) {
    cache.put(lookup.word(), lookup.hash, out, count);
  } else if (is_cached) {
    cache.put(piece, lookup.hash, out, count);
  }
  return count;
}

// Batch by batch: first ask for the memory of all words, then look at it.
void Encoder::encode_ordinary(WordCache& cache, std::string_view text, Ids& out) const {
  const char* limit = text.data() + text.size();
  std::array<Lookup, Splitter::kBatch> lookups;
  splitter_.for_each_batch(text, [&](size_t begin, const size_t* ends, size_t count) {
    cache.reserve(count);
    for (size_t i = 0, start = begin; i < count; start = ends[i++]) {
      const size_t size = ends[i] - start;
      Lookup& lookup = lookups[i];
      if (size <= kMaxShort) {
        const ShortWord word = pack_word(text.data() + start, size, limit);
        lookup = {word.lo, word.hi, hash_word(word), nullptr};
      } else {
        lookup.hash = size <= WordCache::kLongBytes ? hash_bytes(text.substr(start, size)) : 0;
      }
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
        found = WordCache::find_tiny(lookup.line, lookup.word(), next);
      } else if (size <= kMaxShort) {
        found = WordCache::find_short(lookup.line, lookup.word(), next);
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
