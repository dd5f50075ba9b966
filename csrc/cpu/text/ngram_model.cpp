#include "cpu/text/ngram_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "cpu/text/hash.h"

namespace cs336::text {
namespace {

constexpr uint64_t kBase = 0x9E3779B97F4A7C15u, kBegin = 0x2545F4914F6CDD1Du, kEnd = 0x27220A95FE1DBF8Bu;
constexpr size_t kAhead = 4;  // units whose entries are fetched ahead

// Of the n-gram of this length with this rolling hash; the one of length 0 is the context of single units. Never 0.
uint64_t key_of(size_t length, uint64_t hash) { return hash_number(hash, length * kEnd) | 1; }

// The rolling hashes of the n-grams that end at each unit: [i][k] is that of length k. Unit 0 is the mark of the begin.
using Hashes = std::vector<std::array<uint64_t, NgramModel::kMostOrder + 1>>;

void hashes_of(std::string_view utf8, Unit unit, size_t order, Hashes& all) {
  thread_local std::string normalized;
  thread_local std::vector<uint64_t> units;
  units_of(utf8, unit, normalized, units);
  units.push_back(kEnd);
  all.resize(units.size() + 1);
  all[0][0] = 0;
  // Before the begin there is nothing but its mark.
  for (size_t k = 1; k <= order; ++k) all[0][k] = all[0][k - 1] * kBase + kBegin;
  for (size_t i = 1; i < all.size(); ++i) {
    all[i][0] = 0;
    for (size_t k = 1; k <= order; ++k) all[i][k] = all[i - 1][k - 1] * kBase + units[i - 1];
  }
}

}  // namespace

NgramModel::Entry* NgramModel::slot(uint64_t key) const {
  const size_t mask = table_.size() - 1;
  auto* table = const_cast<Entry*>(table_.data());
  size_t at = key >> 1 & mask;
  while (table[at].key != 0 && table[at].key != key) at = (at + 1) & mask;
  return table + at;
}

NgramModel::Entry& NgramModel::entry(uint64_t key) {
  Entry* found = slot(key);
  if (found->key != 0) return *found;
  if (++used_ * 2 > table_.size()) {
    TableVector<Entry> old(table_.size() * 2);
    old.swap(table_);
    for (const Entry& e : old) {
      if (e.key != 0) *slot(e.key) = e;
    }
    found = slot(key);
  }
  *found = {key, 0, 0, 0};
  return *found;
}

// An n-gram that is new to its order is one more word before the n-gram without its first.
void NgramModel::count(const uint64_t* hashes, const uint64_t* before) {
  for (size_t length = order_; length > 0; --length) {
    const uint32_t seen = entry(key_of(length, hashes[length])).count++;
    uint64_t* few = &few_[2 * (length - 1)];
    if (seen < 2) ++few[seen];
    if (seen == 1 || seen == 2) --few[seen - 1];
    const bool is_new = seen == 0;
    Entry& context = entry(key_of(length - 1, before[length - 1]));
    ++context.sum;
    context.distinct += is_new;
    if (!is_new) return;
  }
}

void NgramModel::add(std::string_view utf8) {
  thread_local Hashes all;
  hashes_of(utf8, unit_, order_, all);
  units_ += all.size() - 1;
  if (units_ > std::numeric_limits<uint32_t>::max()) throw std::overflow_error("an n-gram model counts 2^32 units");
  for (size_t i = 1; i < all.size(); ++i) {
    if (i + kAhead < all.size()) {
      __builtin_prefetch(&table_[key_of(order_, all[i + kAhead][order_]) >> 1 & (table_.size() - 1)]);
    }
    count(all[i].data(), all[i - 1].data());
  }
}

NgramModel::Score NgramModel::score(std::string_view utf8) const {
  thread_local Hashes all;
  hashes_of(utf8, unit_, order_, all);
  const auto find = [&](size_t i, size_t k) { return slot(key_of(k, all[i][k])); };
  std::array<const Entry*, kMostOrder + 1> contexts, found;
  for (size_t k = 0; k < order_; ++k) contexts[k] = find(0, k);
  std::array<double, kMostOrder> discounts;
  for (size_t k = 0; k < order_; ++k) {
    // All counts above one would leave nothing for what was not seen.
    const auto once = static_cast<double>(std::max<uint64_t>(few_[2 * k], 1)),
               twice = static_cast<double>(few_[2 * k + 1]);
    discounts[k] = once / (once + 2 * twice);
  }
  const double unseen = 1 / (static_cast<double>(contexts[0]->distinct) + 1);
  Score score;
  for (size_t i = 1; i < all.size(); ++i) {
    if (i + kAhead < all.size()) {
      for (size_t k = 1; k <= order_; ++k) {
        __builtin_prefetch(&table_[key_of(k, all[i + kAhead][k]) >> 1 & (table_.size() - 1)]);
      }
    }
    found[0] = contexts[0];
    double p = unseen;
    for (size_t k = 1; k <= order_; ++k) {
      found[k] = find(i, k);
      const Entry& context = *contexts[k - 1];
      if (context.sum == 0) continue;
      const double seen = std::max(static_cast<double>(found[k]->count) - discounts[k - 1], 0.0);
      p = (seen + discounts[k - 1] * static_cast<double>(context.distinct) * p) / static_cast<double>(context.sum);
    }
    score.log_probability += std::log(p);
    contexts = found;
  }
  score.units = all.size() - 1;
  return score;
}

std::vector<NgramModel::Entry> NgramModel::entries() const {
  std::vector<Entry> all;
  all.reserve(used_);
  for (const Entry& e : table_) {
    if (e.key != 0) all.push_back(e);
  }
  std::sort(all.begin(), all.end(), [](const Entry& a, const Entry& b) { return a.key < b.key; });
  return all;
}

void NgramModel::restore(std::span<const Entry> entries, std::span<const uint64_t> few) {
  if (few.size() != 2 * order_) throw std::invalid_argument("expected two numbers an order");
  for (const Entry& e : entries) {
    if (e.key % 2 == 0) throw std::invalid_argument("an n-gram has a key that none can have");
    entry(e.key) = e;
  }
  std::copy(few.begin(), few.end(), few_.begin());
}

}  // namespace cs336::text
