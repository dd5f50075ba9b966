#include "cpu/text/bpe_merge.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <queue>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "cpu/text/interrupt.h"
#include "cpu/text/utf8.h"

namespace cs336::text {
namespace {

constexpr size_t kFew = 64;  // bytes of a piece up to which a scan for the next merge beats a heap

// Every way to make a token of two others.
std::vector<Merge> all_splits(const TokenBytes& tokens, const std::vector<uint32_t>& ordinary) {
  std::unordered_map<std::string_view, uint32_t> id_of;
  std::set<size_t> sizes;  // of tokens: most cuts of a very long one leave a half that is none
  for (const uint32_t id : ordinary) {
    id_of.emplace(tokens[id], id);
    sizes.insert(tokens[id].size());
  }
  std::vector<Merge> merges;
  for (const uint32_t id : ordinary) {
    for (const size_t size : sizes) {
      if (size >= tokens[id].size()) break;
      if (!sizes.contains(tokens[id].size() - size)) continue;
      const auto left = id_of.find(tokens[id].substr(0, size)), right = id_of.find(tokens[id].substr(size));
      if (left != id_of.end() && right != id_of.end()) merges.push_back({left->second, right->second, id, id});
    }
  }
  return merges;
}

}  // namespace

TokenBytes::TokenBytes(const Tokens& tokens) {
  uint32_t last = 0;
  size_t size = 0;
  for (const auto& [id, bytes] : tokens) {
    last = std::max(last, id);
    size += bytes.size();
  }
  if (size > UINT32_MAX) throw std::length_error("the tokens of a vocabulary must be less than 4 GB");
  offsets_.resize(size_t{last} + 2);
  for (const auto& [id, bytes] : tokens) offsets_[id + 1] = static_cast<uint32_t>(bytes.size());
  for (size_t i = 1; i < offsets_.size(); ++i) offsets_[i] += offsets_[i - 1];
  bytes_.resize(size);
  for (const auto& [id, bytes] : tokens) std::copy(bytes.begin(), bytes.end(), bytes_.begin() + offsets_[id]);
}

MergeTable::MergeTable(size_t capacity) { make(std::bit_ceil(std::max<size_t>(capacity + capacity / 4, 1 << 12))); }

void MergeTable::make(size_t slots) {
  slots_.assign(slots, kEmpty);
  filter_.assign(slots / 8, 0);
  shift_ = kPairBits - std::countr_zero(slots);
}

void MergeTable::add(uint32_t left, uint32_t right, uint32_t rank) {
  if (find(left, right) == kNoRank) put(mix(left, right), rank);
}

void MergeTable::put(uint64_t mixed, uint32_t rank) {
  size_t i = mixed >> shift_, distance = 0;
  while (slots_[i] != kEmpty) i = (i + 1) & (slots_.size() - 1), ++distance;
  if (distance <= max_distance()) {
    const uint64_t bit = mixed >> (shift_ - 3);
    filter_[bit / 64] |= uint64_t{1} << bit % 64;
    slots_[i] = (key_of(mixed) + distance) << kRankBits | rank;
    return;
  }
  const TableVector<uint64_t> old = std::move(slots_);
  const int old_shift = shift_, distance_bits = kKeyBits - shift_;
  const uint64_t old_max = max_distance();
  make(2 * old.size());
  for (size_t k = 0; k < old.size(); ++k) {
    if (old[k] == kEmpty) continue;
    const uint64_t key = old[k] >> kRankBits, place = (k - (key & old_max)) & (old.size() - 1);
    put(place << old_shift | key >> distance_bits, old[k] & kMaxId);
  }
  put(mixed, rank);
}

Merger::Merger(const TokenBytes& tokens, const Alphabet& alphabet, const std::vector<Merge>& merges)
    : alphabet_(alphabet), byte_ranks_(1 << 16, kNoRank), ranks_(merges.size()) {
  for (const Merge& merge : merges) add(tokens, merge);
}

// What a stretch of text merges to depends on its bytes alone, as long as no merge goes across its ends. So a token is
// only ever made of the two that its own bytes come to last: of all its splits the table needs that one. It is found by
// the merges of lower ranks.
Merger::Merger(const TokenBytes& tokens, const Alphabet& alphabet, const std::vector<uint32_t>& ordinary)
    : alphabet_(alphabet), byte_ranks_(1 << 16, kNoRank), ranks_(ordinary.size()) {
  std::vector<uint32_t> ids, unmade;
  const auto comes_to_two = [&](uint32_t id, uint32_t below) {
    ids.resize(tokens[id].size());
    return tokens[id].size() > 1 && has_bytes(tokens[id]) && merge(tokens[id], below, ids.data()) == 2;
  };
  for (const uint32_t id : ordinary) {
    if (comes_to_two(id, id)) {
      add(tokens, {ids[0], ids[1], id, id});
    } else {
      unmade.push_back(id);
    }
  }
  // A token of a higher rank may be part of one of a lower rank; then all splits are needed.
  if (std::none_of(unmade.begin(), unmade.end(), [&](uint32_t id) { return comes_to_two(id, kNoRank); })) return;
  for (const Merge& merge : all_splits(tokens, ordinary)) add(tokens, merge);
}

void Merger::add(const TokenBytes& tokens, const Merge& m) {
  if (m.rank > kMaxRank)
    throw std::length_error("ranks must be below 2**24 - 1: of merges their number, else the ids of tokens");
  ranks_.add(m.left, m.right, m.rank);
  if (m.rank >= results_.size()) results_.resize(m.rank + 1, kNoId);
  results_[m.rank] = m.result;
  if (m.order != kNoRank) {
    orders_.resize(results_.size());
    orders_[m.rank] = m.order;
  }
  const std::string_view left = tokens[m.left], right = tokens[m.right];
  if (left.size() != 1 || right.size() != 1) return;
  byte_ranks_[static_cast<uint8_t>(left[0]) << 8 | static_cast<uint8_t>(right[0])] = ranks_.find(m.left, m.right);
}

bool Merger::has_bytes(std::string_view piece) const {
  const auto has = [&](char c) { return alphabet_.byte_ids[static_cast<uint8_t>(c)] != kNoId; };
  return std::all_of(piece.begin(), piece.end(), has);
}

uint32_t Merger::byte_id(uint8_t byte) const {
  const uint32_t id = alphabet_.byte_ids[byte];
  if (id == kNoId) {
    char message[96];
    std::snprintf(message, sizeof(message), "the byte 0x%02X of the text is not in the vocabulary", byte);
    throw std::invalid_argument(message);
  }
  return id;
}

template <class Begun>
void Merger::begin(const uint8_t* piece, size_t size, Begun&& begun) const {
  if (!alphabet_.by_chars()) {
    for (size_t i = 0; i < size; ++i) begun(i, byte_id(piece[i]));
    return;
  }
  const uint8_t* const end = piece + size;
  bool was_unknown = false;
  for (const uint8_t* p = piece; p < end;) {
    uint32_t id = alphabet_.byte_ids[*p];
    size_t bytes = 1;
    if (*p >= 0x80) {
      const CodePoint c = decode_multibyte(p, end);
      const bool is_token = c.size > 0 && c.code < alphabet_.char_ids.size() && alphabet_.char_ids[c.code] != kNoId;
      if (is_token) id = alphabet_.char_ids[c.code];
      if (is_token || (c.size > 0 && id == alphabet_.unknown)) bytes = c.size;
    }
    const bool is_unknown = id == alphabet_.unknown;
    if (!(is_unknown && was_unknown && alphabet_.fuses_unknown)) begun(static_cast<size_t>(p - piece), id);
    was_unknown = is_unknown;
    p += bytes;
  }
}

size_t Merger::merge(std::string_view piece, uint32_t below, uint32_t* out) const {
  if (piece.empty()) return 0;
  const auto* bytes = reinterpret_cast<const uint8_t*>(piece.data());
  return piece.size() <= kFew ? merge_few(bytes, piece.size(), below, out)
                              : merge_many(bytes, piece.size(), below, out);
}

// Tokens lie at the place of their first byte, `alive` has a bit for each. A key is the order of the merge of a token
// and the next, its place, and its rank: the smallest is the merge to do, the leftmost of equals. Keys of 64 bits,
// since the compiler would find the smallest of shorter ones in vectors, which wait for the keys just written.
size_t Merger::merge_few(const uint8_t* piece, size_t size, uint32_t below, uint32_t* out) const {
  constexpr int kPlaceBits = 8, kRankBits = 24;
  std::array<uint64_t, kFew> keys;
  const auto set = [&](size_t i, uint32_t rank) {
    keys[i] = rank < below ? (uint64_t{order_of(rank)} << kPlaceBits | i) << kRankBits | rank : UINT64_MAX;
  };
  uint64_t alive = 0;
  begin(piece, size, [&](size_t i, uint32_t id) {
    out[i] = id;
    alive |= uint64_t{1} << i;
  });
  if (alive == ~uint64_t{0} >> (kFew - size)) {  // each is a byte
    for (size_t i = 0; i + 1 < size; ++i) set(i, byte_ranks_[piece[i] << 8 | piece[i + 1]]);
  } else {
    std::fill_n(keys.begin(), size, UINT64_MAX);
    for (uint64_t left = alive; (left & (left - 1)) != 0;) {
      const int i = std::countr_zero(left);
      left &= left - 1;
      set(i, ranks_.find(out[i], out[std::countr_zero(left)]));
    }
  }
  for (;;) {
    uint64_t best = UINT64_MAX;
    for (size_t i = 0; i + 1 < size; ++i) best = std::min(best, keys[i]);
    if (best == UINT64_MAX) {
      size_t count = 0;
      for (; alive != 0; alive &= alive - 1) out[count++] = out[std::countr_zero(alive)];
      return count;
    }
    const size_t i = best >> kRankBits & (kFew - 1);
    out[i] = results_[best & kMaxId];
    uint64_t later = alive & ~uint64_t{1} << i;
    const int gone = std::countr_zero(later);
    later &= later - 1;
    alive ^= uint64_t{1} << gone;
    keys[gone % kFew] = keys[i] = UINT64_MAX;
    if (later != 0) set(i, ranks_.find(out[i], out[std::countr_zero(later)]));
    if (const uint64_t earlier = alive & ((uint64_t{1} << i) - 1); earlier != 0) {
      const size_t previous = 63 - std::countl_zero(earlier);
      set(previous, ranks_.find(out[previous], out[i]));
    }
  }
}

// O(n log n): a heap of merges over a linked list of tokens.
size_t Merger::merge_many(const uint8_t* piece, size_t size, uint32_t below, uint32_t* out) const {
  if (size >= kNoId) throw std::length_error("a piece of text without a break must be shorter than 4 GB");
  struct Node {
    uint32_t id, previous, next;
    uint32_t rank;  // of the merge with the next
  };
  struct Candidate {
    uint32_t order, position;
    bool operator>(const Candidate& o) const { return order != o.order ? order > o.order : position > o.position; }
  };
  std::vector<Node> nodes(size);
  std::vector<Candidate> candidates;
  candidates.reserve(size);
  std::priority_queue queue(std::greater<Candidate>{}, std::move(candidates));
  const auto last = static_cast<uint32_t>(size - 1);
  PollEvery<1 << 12> poll;
  uint32_t previous = 0;
  begin(piece, size, [&](size_t place, uint32_t id) {
    const auto i = static_cast<uint32_t>(place);
    nodes[i] = {id, previous, last + 1, kNoRank};
    if (i > 0) nodes[previous].next = i;
    previous = i;
    poll();
  });
  const auto update = [&](uint32_t i) {
    Node& node = nodes[i];
    node.rank = node.next <= last ? ranks_.find(node.id, nodes[node.next].id) : kNoRank;
    if (node.rank < below) queue.push({order_of(node.rank), i});
  };
  for (uint32_t i = 0; i < last; i = nodes[i].next, poll()) update(i);
  for (; !queue.empty(); poll()) {
    const Candidate top = queue.top();
    queue.pop();
    Node& node = nodes[top.position];
    if (node.rank == kNoRank || order_of(node.rank) != top.order) continue;  // one of the two has been merged since
    Node& gone = nodes[node.next];
    gone.rank = kNoRank;
    node.id = results_[node.rank];
    node.next = gone.next;
    if (node.next <= last) nodes[node.next].previous = top.position;
    update(top.position);
    if (top.position > 0) update(node.previous);
  }
  size_t count = 0;
  for (uint32_t i = 0; i <= last; i = nodes[i].next) out[count++] = nodes[i].id;
  return count;
}

}  // namespace cs336::text
