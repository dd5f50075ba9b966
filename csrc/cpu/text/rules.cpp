#include "cpu/text/rules.h"

#include <algorithm>
#include <vector>

#include "cpu/text/hash.h"
#include "cpu/text/line_ends.h"
#include "cpu/text/unicode.h"
#include "cpu/text/words.h"

namespace cs336::text {
namespace {

using View = std::string_view;
constexpr View kEllipsis = "\xE2\x80\xA6", kBullet = "\xE2\x80\xA2";
constexpr uint64_t kBase = 0x9E3779B97F4A7C15u;

uint64_t count_chars(View text) {
  return static_cast<uint64_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

uint64_t count_of(View text, View part) {
  uint64_t count = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + part.size())) ++count;
  return count;
}

View strip_left(View text) {
  const auto* p = reinterpret_cast<const uint8_t*>(text.data());
  const auto* end = p + text.size();
  while (p < end) {
    const Char c = char_at(p, end);
    if (!(c.cls & kSpace)) break;
    p += c.size;
  }
  return text.substr(text.size() - static_cast<size_t>(end - p));
}

View strip_right(View text) {
  while (!text.empty()) {
    size_t size = 1;
    while (size < 3 && size < text.size() && (text[text.size() - size] & 0xC0) == 0x80) ++size;
    const auto* p = reinterpret_cast<const uint8_t*>(text.data() + text.size() - size);
    const Char c = char_at(p, p + size);
    if (!(c.cls & kSpace) || c.size != size) break;
    text.remove_suffix(size);
  }
  return text;
}

View strip(View text) { return strip_right(strip_left(text)); }

// Parts between runs of `least` or more "\n".
template <class Visit>
void for_each_part(View text, size_t least, Visit&& visit) {
  size_t begin = 0;
  for (size_t i = text.find('\n'); i != text.npos; i = text.find('\n', i)) {
    const size_t end = std::min(text.find_first_not_of('\n', i), text.size());
    if (end - i >= least) {
      visit(text.substr(begin, i - begin));
      begin = end;
    }
    i = end;
  }
  visit(text.substr(begin));
}

// How often a hash occurred, and where first.
class HashCounts {
 public:
  struct Entry {
    uint64_t hash;
    uint32_t count, first;
  };
  // Room for so many.
  void clear(size_t expected) {
    size_t size = 64;
    while (size < 2 * expected) size *= 2;
    table_.assign(size, {});
  }
  // Its count is 0 if it is new.
  Entry& find(uint64_t hash) {
    const size_t mask = table_.size() - 1;
    for (size_t at = hash & mask;; at = (at + 1) & mask) {
      Entry& entry = table_[at];
      if (entry.count == 0) entry.hash = hash;
      if (entry.hash == hash) return entry;
    }
  }

 private:
  std::vector<Entry> table_;
};

// How many of the parts occurred before, and their characters.
struct Repeats {
  uint64_t parts = 0, repeated = 0, repeated_chars = 0;
  void add(View part, HashCounts& seen) {
    ++parts;
    if (seen.find(hash_bytes(part)).count++ == 0) return;
    ++repeated;
    repeated_chars += count_chars(part);
  }
};

// Hashes of the n-grams of words, from those of all beginnings of the text.
class NGrams {
 public:
  explicit NGrams(const std::vector<Word>& words) : hashes_{0}, chars_{0} {
    for (const Word& word : words) {
      hashes_.push_back(hashes_.back() * kBase + hash_bytes(word.text));
      chars_.push_back(chars_.back() + word.chars);
    }
  }
  void set_size(size_t n) {
    n_ = n;
    power_ = 1;
    for (size_t i = 0; i < n; ++i) power_ *= kBase;
  }
  size_t count() const { return hashes_.size() > n_ ? hashes_.size() - n_ : 0; }
  uint64_t hash(size_t i) const { return hash_number(hashes_[i + n_] - hashes_[i] * power_); }
  uint64_t chars(size_t i) const { return chars_[i + n_] - chars_[i]; }  // without spaces

 private:
  std::vector<uint64_t> hashes_, chars_;
  size_t n_ = 1;
  uint64_t power_ = 1;
};

// Of several n-grams that are as frequent it is the one that comes first.
uint64_t top_ngram_chars(const NGrams& ngrams, size_t n, HashCounts& seen) {
  if (ngrams.count() == 0) return 0;
  seen.clear(ngrams.count());
  uint32_t best = 0, first = 0;
  for (size_t i = 0; i < ngrams.count(); ++i) {
    HashCounts::Entry& entry = seen.find(ngrams.hash(i));
    if (entry.count++ == 0) entry.first = static_cast<uint32_t>(i);
    if (entry.count < best || (entry.count == best && entry.first > first)) continue;
    best = entry.count;
    first = entry.first;
  }
  return (ngrams.chars(first) + n - 1) * best;
}

uint64_t repeated_ngram_chars(const NGrams& ngrams, size_t n, HashCounts& seen) {
  seen.clear(ngrams.count());
  uint64_t chars = 0;
  for (size_t i = 0; i < ngrams.count();) {
    if (seen.find(ngrams.hash(i)).count++ == 0) {
      ++i;
    } else {
      chars += ngrams.chars(i);
      i += n;
    }
  }
  return chars;
}

uint64_t stop_word_bit(View word) {
  constexpr std::array<View, 8> kStopWords = {"the", "be", "to", "of", "and", "that", "have", "with"};
  if (word.size() < 2 || word.size() > 4) return 0;
  const auto* found = std::find(kStopWords.begin(), kStopWords.end(), word);
  return found == kStopWords.end() ? 0 : uint64_t{1} << (found - kStopWords.begin());
}

thread_local std::vector<Word> words;
thread_local HashCounts seen;

}  // namespace

QualityCounts gopher_quality_counts(View text) {
  split_words(text, words);
  QualityCounts counts{};
  counts.words = words.size();
  uint64_t stop_words = 0;
  for (const Word& word : words) {
    counts.letter_words += word.has_letter;
    stop_words |= stop_word_bit(word.text);
    if (word.is_symbol) continue;
    ++counts.plain_words;
    counts.plain_chars += word.chars;
  }
  counts.stop_words = static_cast<uint64_t>(__builtin_popcountll(stop_words));
  counts.hashes = static_cast<uint64_t>(std::count(text.begin(), text.end(), '#'));
  counts.ellipses = count_of(text, "...") + count_of(text, kEllipsis);
  for_each_line(text, [&](View line) {
    ++counts.lines;
    const View left = strip_left(line), right = strip_right(line);
    counts.bullet_lines += left.starts_with(kBullet) || left.starts_with('-');
    counts.ellipsis_lines += right.ends_with("...") || right.ends_with(kEllipsis);
    return true;
  });
  return counts;
}

RepetitionCounts gopher_repetition_counts(View text) {
  RepetitionCounts counts{};
  counts.chars = count_chars(text);
  const size_t most_parts = static_cast<size_t>(std::count(text.begin(), text.end(), '\n')) + 1;
  Repeats paragraphs, lines;
  seen.clear(most_parts);
  for_each_part(strip(text), 2, [&](View part) { paragraphs.add(part, seen); });
  seen.clear(most_parts);
  for_each_part(text, 1, [&](View part) { lines.add(part, seen); });
  counts.paragraphs = paragraphs.parts;
  counts.repeated_paragraphs = paragraphs.repeated;
  counts.repeated_paragraph_chars = paragraphs.repeated_chars;
  counts.lines = lines.parts;
  counts.repeated_lines = lines.repeated;
  counts.repeated_line_chars = lines.repeated_chars;

  split_words(text, words);
  NGrams ngrams(words);
  for (size_t i = 0; i < counts.kTop; ++i) {
    ngrams.set_size(counts.kFirstTop + i);
    counts.top_chars[i] = top_ngram_chars(ngrams, counts.kFirstTop + i, seen);
  }
  for (size_t i = 0; i < counts.kRepeated; ++i) {
    ngrams.set_size(counts.kFirstRepeated + i);
    counts.repeated_chars[i] = repeated_ngram_chars(ngrams, counts.kFirstRepeated + i, seen);
    if (counts.repeated_chars[i] == 0) break;  // where no n-gram repeats no longer one does
  }
  return counts;
}

FineWebCounts fineweb_counts(View text) {
  constexpr uint64_t kShort = 30;
  FineWebCounts counts{};
  counts.newlines = static_cast<uint64_t>(std::count(text.begin(), text.end(), '\n'));
  counts.chars = count_chars(text) - counts.newlines;
  Repeats lines;
  seen.clear(counts.newlines + 1);
  for_each_part(text, 1, [&](View line) {
    if (strip_left(line).empty()) return;
    lines.add(line, seen);
    size_t size = 1;
    while (size < 4 && size < line.size() && (line[line.size() - size] & 0xC0) == 0x80) ++size;
    const auto* last = reinterpret_cast<const uint8_t*>(line.data() + line.size() - size);
    const uint32_t code = *last < 0x80 ? *last : decode_multibyte(last, last + size).code;
    counts.ended_lines += ends_sentence(code);
    counts.short_lines += count_chars(line) <= kShort;
  });
  counts.lines = lines.parts;
  counts.repeated_chars = lines.repeated_chars;
  split_words(text, words);
  counts.words = words.size();
  return counts;
}

}  // namespace cs336::text
