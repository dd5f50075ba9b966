#include "cpu/text/ngram_index.h"

#include <algorithm>
#include <vector>

#include "cpu/text/shingles.h"

namespace cs336::text {
namespace {

constexpr size_t kAhead = 16;  // places of the table that are fetched ahead

bool has_words(std::string_view normalized, size_t n) {
  return !normalized.empty() && static_cast<size_t>(std::count(normalized.begin(), normalized.end(), ' ')) + 1 >= n;
}

// Words first, ..., first + n - 1.
std::string words_at(std::string_view normalized, size_t first, size_t n) {
  size_t begin = 0;
  for (; first > 0; --first) begin = normalized.find(' ', begin) + 1;
  size_t end = begin;
  for (; n > 0; --n) end = std::min(normalized.find(' ', end + (end > begin)), normalized.size());
  return std::string(normalized.substr(begin, end - begin));
}

}  // namespace

NgramIndex::Entry* NgramIndex::slot(uint64_t hash) const {
  const size_t mask = table_.size() - 1;
  auto* table = const_cast<Entry*>(table_.data());
  size_t at = hash & mask;
  while (table[at].hash != 0 && table[at].hash != hash) at = (at + 1) & mask;
  return table + at;
}

void NgramIndex::grow() {
  TableVector<Entry> old(table_.size() * 4);
  old.swap(table_);
  for (const Entry& entry : old) {
    if (entry.hash != 0) *slot(entry.hash) = entry;
  }
}

size_t NgramIndex::add(std::string_view utf8, uint32_t item) {
  std::string normalized;
  std::vector<uint64_t> hashes;
  shingles_into(utf8, n_, Unit::kWord, normalized, hashes);
  if (!has_words(normalized, n_)) return 0;
  for (const uint64_t hash : hashes) {
    Entry* place = slot(std::max<uint64_t>(hash, 1));
    if (place->hash != 0) continue;
    *place = {std::max<uint64_t>(hash, 1), item};
    if (++used_ * 2 > table_.size()) grow();
  }
  return hashes.size();
}

std::optional<NgramIndex::Match> NgramIndex::find(std::string_view utf8) const {
  thread_local std::string normalized;
  thread_local std::vector<uint64_t> hashes;
  shingles_into(utf8, n_, Unit::kWord, normalized, hashes);
  if (!has_words(normalized, n_)) return std::nullopt;
  Match match{0, 0, {}};
  for (size_t i = 0; i < hashes.size(); ++i) {
    if (i + kAhead < hashes.size()) __builtin_prefetch(&table_[hashes[i + kAhead] & (table_.size() - 1)]);
    const Entry* place = slot(std::max<uint64_t>(hashes[i], 1));
    if (place->hash == 0) continue;
    if (match.count++ == 0) match = {1, place->item, words_at(normalized, i, n_)};
  }
  return match.count == 0 ? std::nullopt : std::optional(match);
}

}  // namespace cs336::text
