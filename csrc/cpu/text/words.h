// Words as rule-based English tokenizers part them: on white space, with punctuation before and after taken off one
// character at a time, "don't" as do + n't, "Ann's" as Ann + 's, "well-known" as three. The published thresholds of the
// quality rules were set with such words.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace cs336::text {

struct Word {
  std::string_view text;
  uint32_t chars;  // code points
  bool has_letter;
  bool is_symbol;  // punctuation alone
};

// Instead of what `words` held.
void split_words(std::string_view utf8, std::vector<Word>& words);

// How many sentences the words of one line are: one ends at . ! ? or the like, and the next begins with the first word
// after it that is no punctuation.
size_t count_sentences(const std::vector<Word>& words);

// What ends a sentence in any script (Unicode's Sentence_Terminal).
bool ends_sentence(uint32_t code);

}  // namespace cs336::text
