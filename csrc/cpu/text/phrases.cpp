#include "cpu/text/phrases.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/text/unicode.h"

namespace cs336::text {
namespace {

constexpr uint16_t kWordClasses = kLetter | kNumber | kMark;

// Whether a word goes on across a place beside this character.
bool is_word_part(uint32_t code) {
  const bool is_spaceless = (code >= 0x0E00 && code < 0x0F00) || (code >= 0x1000 && code < 0x10A0) ||
                            (code >= 0x1780 && code < 0x1800);  // Thai and Lao, Burmese, Khmer
  if (is_spaceless || (kClassOf[code] & (kHan | kCjk))) return false;
  return code == '_' || (kClassOf[code] & kWordClasses) != 0;
}

uint32_t code_at(std::string_view utf8, size_t at) {
  const auto* p = reinterpret_cast<const uint8_t*>(utf8.data() + at);
  if (*p < 0x80) return *p;
  const CodePoint c = decode_multibyte(p, reinterpret_cast<const uint8_t*>(utf8.data() + utf8.size()));
  return c.size == 0 ? 0xFFFD : c.code;
}

// Of the character that ends at `end`.
uint32_t code_before(std::string_view utf8, size_t end) {
  size_t at = end - 1;
  while (at > 0 && end - at < 4 && (utf8[at] & 0xC0) == 0x80) --at;
  return code_at(utf8, at);
}

}  // namespace

Phrases::Phrases(std::span<const std::string> phrases, bool whole_words) {
  size_t bytes = 1;
  for (const std::string& phrase : phrases) {
    if (phrase.empty()) throw std::invalid_argument("a phrase to look for is empty");
    bytes += phrase.size();
    for (const char c : phrase) class_of_[static_cast<uint8_t>(c)] = 1;
    phrases_.push_back({static_cast<uint32_t>(phrase.size()), whole_words && is_word_part(code_at(phrase, 0)),
                        whole_words && is_word_part(code_before(phrase, phrase.size()))});
  }
  for (uint8_t& c : class_of_) c = c == 0 ? 0 : static_cast<uint8_t>(num_classes_++);
  if (bytes * num_classes_ > kMostBytes / sizeof(uint32_t)) {
    throw std::invalid_argument("these phrases are too many for one table: " + std::to_string(bytes) + " bytes");
  }
  // The trie, 0 standing for no edge.
  const auto add_state = [&] {
    phrase_of_.push_back(kNone);
    next_.resize(next_.size() + num_classes_);
    return static_cast<uint32_t>(phrase_of_.size() - 1);
  };
  add_state();
  for (uint32_t i = 0; i < phrases.size(); ++i) {
    size_t state = 0;
    for (const char c : phrases[i]) {
      const size_t edge = state * num_classes_ + class_of_[static_cast<uint8_t>(c)];
      if (next_[edge] == 0) {
        const uint32_t added = add_state();
        next_[edge] = added;
      }
      state = next_[edge];
    }
    if (phrase_of_[state] == kNone) phrase_of_[state] = i;
  }
  // Breadth first: what a state has no edge for, its longest suffix in the trie decides.
  std::vector<uint32_t> suffix(phrase_of_.size()), queue;
  shorter_.resize(phrase_of_.size());
  for (size_t c = 0; c < num_classes_; ++c) {
    if (next_[c] != 0) queue.push_back(next_[c]);
  }
  for (size_t done = 0; done < queue.size(); ++done) {
    const size_t state = queue[done], tail = suffix[state];
    shorter_[state] = phrase_of_[tail] != kNone ? static_cast<uint32_t>(tail) : shorter_[tail];
    for (size_t c = 0; c < num_classes_; ++c) {
      uint32_t& next = next_[state * num_classes_ + c];
      const uint32_t other = next_[tail * num_classes_ + c];
      if (next == 0) {
        next = other;
      } else {
        suffix[next] = other;
        queue.push_back(next);
      }
    }
  }
}

bool Phrases::counts(const Phrase& phrase, std::string_view utf8, size_t end) const {
  const size_t begin = end - phrase.size;
  if (phrase.needs_start && begin > 0 && is_word_part(code_before(utf8, begin))) return false;
  return !phrase.needs_end || end == utf8.size() || !is_word_part(code_at(utf8, end));
}

Phrases::Found Phrases::find(std::string_view utf8, size_t most) const {
  Found found{0, kNone};
  uint32_t state = 0;
  for (size_t i = 0; i < utf8.size(); ++i) {
    state = next_[state * num_classes_ + class_of_[static_cast<uint8_t>(utf8[i])]];
    if (phrase_of_[state] == kNone && shorter_[state] == 0) continue;
    for (uint32_t at = phrase_of_[state] != kNone ? state : shorter_[state]; at != 0; at = shorter_[at]) {
      if (!counts(phrases_[phrase_of_[at]], utf8, i + 1)) continue;
      if (found.count++ == 0) found.first = phrase_of_[at];
      if (found.count >= most) return found;
    }
  }
  return found;
}

}  // namespace cs336::text
