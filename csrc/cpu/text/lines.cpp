#include "cpu/text/lines.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/text/hash.h"

namespace cs336::text {
namespace {

constexpr size_t kBatch = 32;      // lines whose places in the table are fetched together
constexpr uint64_t kRepeated = 1;  // bit of a key
constexpr uint64_t kKey = ~kRepeated;

template <class Visit>
void for_each_line(std::string_view text, Visit&& visit) {
  for (size_t begin = 0; begin < text.size();) {
    const auto* end = static_cast<const char*>(std::memchr(text.data() + begin, '\n', text.size() - begin));
    const size_t size = end == nullptr ? text.size() - begin : static_cast<size_t>(end - text.data()) - begin;
    visit(text.substr(begin, size));
    begin += size + 1;
  }
}

// Never 0, which is an empty place; the lowest bit is free.
uint64_t key_of(std::string_view line) { return (hash_bytes(line) | 2) & kKey; }

// visit(i, key) for every line, with `touch` called for its key some lines ahead.
template <class Touch, class Visit>
void for_each_key(std::string_view text, Touch&& touch, Visit&& visit) {
  std::array<uint64_t, kBatch> keys;
  size_t filled = 0, done = 0;
  const auto flush = [&] {
    for (size_t i = 0; i < filled; ++i) visit(done + i, keys[i]);
    done += filled;
    filled = 0;
  };
  for_each_line(text, [&](std::string_view line) {
    keys[filled] = key_of(line);
    touch(keys[filled]);
    if (++filled == kBatch) flush();
  });
  flush();
}

}  // namespace

uint64_t* LineCounts::slot(uint64_t key) const {
  const size_t mask = table_.size() - 1;
  auto* table = const_cast<uint64_t*>(table_.data());
  size_t at = key >> 2 & mask;
  while (table[at] != 0 && (table[at] & kKey) != key) at = (at + 1) & mask;
  return table + at;
}

bool LineCounts::insert(uint64_t key) {
  uint64_t* place = slot(key);
  if (*place != 0) {
    *place |= kRepeated;
    return false;
  }
  *place = key;
  if (++used_ * 2 > table_.size()) grow();
  return true;
}

void LineCounts::grow() {
  TableVector<uint64_t> old(table_.size() * 4);
  old.swap(table_);
  for (const uint64_t entry : old) {
    if (entry != 0) *slot(entry & kKey) = entry;
  }
}

void LineCounts::add(std::string_view text) {
  for_each_key(
      text, [&](uint64_t key) { __builtin_prefetch(&table_[key >> 2 & (table_.size() - 1)]); },
      [&](size_t, uint64_t key) {
        if (is_mine(key)) insert(key);
      });
}

void LineCounts::mark_repeated(std::string_view text, uint8_t* drop) const {
  for_each_key(
      text, [&](uint64_t key) { __builtin_prefetch(&table_[key >> 2 & (table_.size() - 1)]); },
      [&](size_t i, uint64_t key) {
        if (is_mine(key)) drop[i] |= *slot(key) & kRepeated;
      });
}

void LineCounts::mark_seen(std::string_view text, uint8_t* drop) {
  for_each_key(
      text, [&](uint64_t key) { __builtin_prefetch(&table_[key >> 2 & (table_.size() - 1)]); },
      [&](size_t i, uint64_t key) {
        if (is_mine(key)) drop[i] |= static_cast<uint8_t>(!insert(key));
      });
}

size_t count_lines(std::string_view text) {
  const auto ends = static_cast<size_t>(std::count(text.begin(), text.end(), '\n'));
  return ends + (!text.empty() && text.back() != '\n');
}

std::string keep_lines(std::string_view text, const uint8_t* drop) {
  std::string kept;
  kept.reserve(text.size());
  size_t i = 0;
  for_each_line(text, [&](std::string_view line) {
    if (drop[i++]) return;
    kept += line;
    if (line.data() + line.size() < text.data() + text.size()) kept += '\n';
  });
  return kept;
}

}  // namespace cs336::text
