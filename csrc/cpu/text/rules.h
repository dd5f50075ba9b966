// The counts that the published quality rules look at: Gopher (arXiv 2112.11446), C4 (1910.10683), FineWeb
// (2406.17557). Lengths are in code points. The thresholds are in cs336/data/filter/rules.py.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace cs336::text {

struct QualityCounts {
  uint64_t words, plain_words, plain_chars;  // plain: not punctuation alone
  uint64_t hashes, ellipses;                 // in the text
  uint64_t lines, bullet_lines, ellipsis_lines;
  uint64_t letter_words;  // with a letter in them
  uint64_t stop_words;    // different ones of the eight
};
QualityCounts gopher_quality_counts(std::string_view utf8);

struct RepetitionCounts {
  static constexpr size_t kTop = 3, kRepeated = 6;
  static constexpr size_t kFirstTop = 2, kFirstRepeated = 5;  // n of the first n-gram
  uint64_t chars;
  uint64_t paragraphs, repeated_paragraphs, repeated_paragraph_chars;
  uint64_t lines, repeated_lines, repeated_line_chars;
  std::array<uint64_t, kTop> top_chars;            // of the most frequent 2-, 3-, 4-gram, all its copies
  std::array<uint64_t, kRepeated> repeated_chars;  // in 5- to 10-grams that occurred before, none counted twice
};
RepetitionCounts gopher_repetition_counts(std::string_view utf8);

struct FineWebCounts {
  uint64_t lines, ended_lines, short_lines;  // that show something; that end a sentence; of 30 characters or fewer
  uint64_t chars, repeated_chars;            // without line ends; in lines that occurred before
  uint64_t newlines, words;
};
FineWebCounts fineweb_counts(std::string_view utf8);

struct C4Counts {
  uint64_t lines, long_word, no_end, few_words, javascript, policy, kept;  // lines, by what became of them
  uint64_t sentences;                                                      // of the kept lines
  bool lorem_ipsum, curly_bracket;
};
// text: the lines that are kept, without citation marks.
C4Counts c4_counts(std::string_view utf8, std::string& text);

}  // namespace cs336::text
