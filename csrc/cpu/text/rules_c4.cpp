// The line rules of C4.
#include <algorithm>
#include <array>
#include <vector>

#include "cpu/text/line_ends.h"
#include "cpu/text/rules.h"
#include "cpu/text/unicode.h"
#include "cpu/text/words.h"

namespace cs336::text {
namespace {

using View = std::string_view;
constexpr uint64_t kLongestWord = 1000, kLeastWords = 3;
constexpr std::array<View, 6> kPolicies = {"terms of use", "privacy policy", "cookie policy",
                                           "uses cookies", "use of cookies", "use cookies"};

// Words between white space, and whether one is too long.
struct Spaced {
  uint64_t words = 0;
  bool too_long = false;
  size_t begin = 0, end = 0;  // of what is visible
};

Spaced read_words(View line) {
  Spaced spaced;
  const auto* start = reinterpret_cast<const uint8_t*>(line.data());
  const auto* end = start + line.size();
  uint64_t chars = 0;
  for (const uint8_t* p = start; p < end;) {
    const Char c = char_at(p, end);
    if (c.cls & kSpace) {
      chars = 0;
    } else {
      if (spaced.end == 0) spaced.begin = static_cast<size_t>(p - start);
      spaced.words += chars == 0;
      spaced.too_long |= ++chars > kLongestWord;
      spaced.end = static_cast<size_t>(p - start) + c.size;
    }
    p += c.size;
  }
  return spaced;
}

// [12], [], [edit], [citation needed]
void drop_citations(View line, std::string& out) {
  out.clear();
  for (size_t at = 0; at < line.size();) {
    const size_t mark = std::min(line.find('[', at), line.size());
    out += line.substr(at, mark - at);
    at = mark;
    if (at == line.size()) return;
    size_t end = at + 1;
    while (end < line.size() && line[end] >= '0' && line[end] <= '9') ++end;
    size_t size = end < line.size() && line[end] == ']' ? end + 1 - at : 0;
    for (const View note : {View("[edit]"), View("[citation needed]")}) {
      if (line.substr(at).starts_with(note)) size = note.size();
    }
    if (size == 0) out += '[';
    at += std::max<size_t>(size, 1);
  }
}

}  // namespace

C4Counts c4_counts(View utf8, std::string& text) {
  thread_local std::vector<Word> words;
  C4Counts counts{};
  text.clear();
  std::string line, lower;
  const auto add_line = [&](View raw) {
    ++counts.lines;
    const Spaced spaced = read_words(raw);
    if (spaced.too_long) return void(++counts.long_word);
    drop_citations(raw.substr(spaced.begin, spaced.end - spaced.begin), line);
    const char last = line.empty() ? ' ' : line.back();
    const bool ends = last == '.' || last == '?' || last == '!' || last == '"' || last == '\'';
    if (!ends || line.ends_with("...")) return void(++counts.no_end);
    if (spaced.words < kLeastWords) return void(++counts.few_words);
    lower.resize(line.size());
    std::transform(line.begin(), line.end(), lower.begin(),
                   [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 32) : c; });
    if (lower.find("lorem ipsum") != lower.npos) return void(counts.lorem_ipsum = true);
    if (lower.find("javascript") != lower.npos) return void(++counts.javascript);
    if (line.find('{') != line.npos) return void(counts.curly_bracket = true);
    const auto in_line = [&](View policy) { return lower.find(policy) != lower.npos; };
    if (std::any_of(kPolicies.begin(), kPolicies.end(), in_line)) return void(++counts.policy);
    split_words(line, words);
    counts.sentences += count_sentences(words);
    if (counts.kept++ > 0) text += '\n';
    text += line;
  };
  for_each_line(utf8, [&](View raw) {
    add_line(raw);
    return !counts.lorem_ipsum && !counts.curly_bracket;
  });
  return counts;
}

}  // namespace cs336::text
