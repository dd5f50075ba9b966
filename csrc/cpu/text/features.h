// Hashed features of a text for linear models: its words, n-grams of words, and n-grams of the characters of a word.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cs336::text {

struct FeatureSpec {
  uint32_t word_ngrams;         // 1: words alone; 2: pairs of neighbours too; ...
  uint32_t char_min, char_max;  // n of the character n-grams of "<word>"; none where char_max is 0
  uint32_t bucket_bits;         // 1..32: a feature is the highest bits of its hash
};

// A word is a run of letters, digits and marks, in lower case where it is ASCII; a Chinese or Japanese character; or a
// run of anything else between white space. Words above kLongestWord bytes have no character n-grams, so that features
// stay in proportion to the text.
class FeatureExtractor {
 public:
  static constexpr size_t kLongestWord = 64;
  explicit FeatureExtractor(const FeatureSpec& spec) : spec_(spec) {}

  // Appends the buckets of a text's features, each once, in the order of their first places.
  void extract(std::string_view utf8, std::vector<uint32_t>& out);

 private:
  void add_word(std::string_view word, std::vector<uint32_t>& out);
  void add_chars(std::string_view word, std::vector<uint32_t>& out) const;
  void keep_distinct(std::vector<uint32_t>& out, size_t begin);
  uint32_t bucket(uint64_t hash) const { return static_cast<uint32_t>(hash >> (64 - spec_.bucket_bits)); }

  FeatureSpec spec_;
  std::string lower_;
  std::vector<uint64_t> recent_;  // hashes of the last words, the newest first
  std::vector<uint64_t> seen_;    // an open table of buckets
};

}  // namespace cs336::text
