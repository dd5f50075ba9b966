#include "cpu/text/lines.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "cpu/text/byte_masks.h"
#include "cpu/text/hash.h"
#include "cpu/text/parallel.h"

namespace cs336::text {
namespace {

constexpr size_t kChunk = 1 << 18;  // bytes; they and what is known of their lines stay in a core's cache
constexpr size_t kAhead = 16;       // keys whose places are fetched ahead

// The next kChunk bytes, to the end of a line.
std::string_view take_chunk(std::string_view& text) {
  const size_t from = std::min(kChunk, text.size());
  const auto* end = static_cast<const char*>(std::memchr(text.data() + from, '\n', text.size() - from));
  const std::string_view chunk =
      text.substr(0, end == nullptr ? text.size() : static_cast<size_t>(end - text.data()) + 1);
  text.remove_prefix(chunk.size());
  return chunk;
}

// Which of 64 bytes end a line.
uint64_t line_ends(const uint8_t* bytes) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += Bytes::kSize) mask |= Bytes(bytes + at).equal('\n') << at;
  return mask;
}

// Where each line ends, its "\n" included. Returns how many there are.
size_t find_ends(std::string_view text, size_t* ends) {
  const size_t* const first = ends;
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  size_t at = 0;
  for (; at + 64 <= text.size(); at += 64) {
    for (uint64_t mask = line_ends(bytes + at); mask != 0; mask &= mask - 1) {
      *ends++ = at + static_cast<size_t>(std::countr_zero(mask)) + 1;
    }
  }
  for (; at < text.size(); ++at) {
    if (bytes[at] == '\n') *ends++ = at + 1;
  }
  if (!text.empty() && text.back() != '\n') *ends++ = text.size();
  return static_cast<size_t>(ends - first);
}

}  // namespace

uint64_t LineTable::key_of(std::string_view line) { return (hash_bytes(line) | 2) & kKey; }

uint64_t* LineTable::slot(uint64_t key) const {
  const size_t mask = table_.size() - 1;
  auto* table = const_cast<uint64_t*>(table_.data());
  size_t at = key >> 2 & mask;
  while (table[at] != 0 && (table[at] & kKey) != key) at = (at + 1) & mask;
  return table + at;
}

bool LineTable::insert(uint64_t key) {
  uint64_t* place = slot(key);
  if (*place != 0) {
    *place |= kRepeated;
    return false;
  }
  *place = key;
  if (++used_ * 2 > table_.size()) grow();
  return true;
}

void LineTable::grow() {
  TableVector<uint64_t> old(table_.size() * 4);
  old.swap(table_);
  for (const uint64_t entry : old) {
    if (entry != 0) *slot(entry & kKey) = entry;
  }
}

LineDedup::Report LineDedup::work(std::string_view text, Pass pass, uint8_t* drop, const Write& write) {
  Report report;
  std::vector<Chunk> chunks(std::min(tables_.size(), text.size() / kChunk + 1));
  Team team(chunks.size());
  while (!text.empty()) {
    size_t count = 0;
    for (; count < chunks.size() && !text.empty(); ++count) chunks[count].text = take_chunk(text);
    team.run(count, [&](size_t i, size_t) { hash(chunks[i]); });
    if (drop != nullptr) {
      uint8_t* flags = drop;
      for (size_t i = 0; i < count; flags += chunks[i++].ends.size()) {
        std::copy_n(flags, chunks[i].ends.size(), chunks[i].drop.begin());
      }
    }
    team.run(tables_.size(), [&](size_t t, size_t) {
      for (size_t i = 0; i < count; ++i) ask(tables_[t], chunks[i].keys[t], pass, chunks[i].drop.data());
    });
    if (pass == Pass::kCount) continue;
    if (write) team.run(count, [&](size_t i, size_t) { gather(chunks[i]); });
    for (size_t i = 0; i < count; ++i) {
      const Chunk& chunk = chunks[i];
      report.lines += chunk.drop.size();
      report.dropped += std::accumulate(chunk.drop.begin(), chunk.drop.end(), uint64_t{0});
      if (drop != nullptr) drop = std::copy(chunk.drop.begin(), chunk.drop.end(), drop);
      if (write) write({chunk.kept.data(), chunk.kept.size()});
    }
  }
  return report;
}

void LineDedup::hash(Chunk& chunk) const {
  const std::string_view text = chunk.text;
  chunk.ends.clear();
  chunk.ends.advance(find_ends(text, chunk.ends.room(text.size())));
  const size_t* const ends = chunk.ends.data();
  const size_t count = chunk.ends.size(), tables = tables_.size();
  chunk.drop.assign(count, 0);
  chunk.keys.resize(tables);
  std::vector<size_t> found(tables);
  for (auto& keys : chunk.keys) keys.resize(count);
  const size_t last = text.ends_with('\n') ? count : count - 1;  // the line without its "\n", if there is one
  size_t begin = 0;
  for (size_t i = 0; i < count; ++i) {
    const size_t end = ends[i];
    const uint64_t key = LineTable::key_of(text.substr(begin, end - begin - (i != last))), high = key >> 32;
    begin = end;
    if (parts_ > 1 && high % parts_ != part_) continue;
    // The table is another function of the hash than the place in it, and than the part.
    const size_t table = tables == 1 ? 0 : (high / parts_ & 0xFFFF) * tables >> 16;
    chunk.keys[table][found[table]++] = {key, i};
  }
  for (size_t t = 0; t < tables; ++t) chunk.keys[t].resize(found[t]);
}

void LineDedup::ask(LineTable& table, const std::vector<Keyed>& keys, Pass pass, uint8_t* drop) {
  for (size_t i = 0; i < keys.size(); ++i) {
    if (i + kAhead < keys.size()) table.prefetch(keys[i + kAhead].key);
    const auto [key, line] = keys[i];
    if (pass == Pass::kRepeated) {
      drop[line] |= static_cast<uint8_t>(table.is_repeated(key));
    } else if (const bool is_new = table.insert(key); pass == Pass::kFirst) {
      drop[line] |= static_cast<uint8_t>(!is_new);
    }
  }
}

void LineDedup::gather(Chunk& chunk) {
  chunk.kept.clear();
  char* const out = chunk.kept.room(chunk.text.size());
  size_t size = 0, begin = 0, end = 0;  // of the lines that stay, and of the last of them that follow one another
  const auto copy = [&] {
    std::memcpy(out + size, chunk.text.data() + begin, end - begin);
    size += end - begin;
  };
  const size_t* const ends = chunk.ends.data();
  for (size_t i = 0; i < chunk.ends.size(); ++i) {
    if (chunk.drop[i]) {
      copy();
      begin = ends[i];
    }
    end = ends[i];
  }
  copy();
  chunk.kept.advance(size);
}

size_t count_lines(std::string_view text) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  size_t ends = 0, at = 0;
  for (; at + 64 <= text.size(); at += 64) ends += static_cast<size_t>(std::popcount(line_ends(bytes + at)));
  for (; at < text.size(); ++at) ends += bytes[at] == '\n';
  return ends + (!text.empty() && text.back() != '\n');
}

}  // namespace cs336::text
