// The pre-tokenization patterns, scanned by hand. cs336/tokenizer/patterns.py holds them as regular expressions.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/text/interrupt.h"
#include "cpu/text/joints.h"

namespace cs336::text {

enum class Pattern { kGpt2, kGpt2Digits, kCl100k, kLlama3, kQwen2, kO200k, kTekken, kKimi, kDeepSeek };
constexpr std::string_view kPatternNames[] = {"gpt2",  "gpt2_digits", "cl100k", "llama3",  "qwen2",
                                              "o200k", "tekken",      "kimi",   "deepseek"};
// The one of this name.
std::optional<Pattern> pattern_named(std::string_view name);

// Writes where each piece of text[begin:] ends, up to `capacity` (at least 64) pieces, and returns how many it wrote.
// The pieces cover the text, so the next call begins at the last end; the end of `text` is the end of the text.
size_t split(Pattern pattern, std::string_view text, size_t begin, size_t* ends, size_t capacity);

// An offset p such that, whatever follows `text`, its pieces are those of text[:p] and then those of the rest.
// Zero if there is none: text is then one piece, a run of white space or a run of letters.
size_t stable_prefix(Pattern pattern, std::string_view text);

// One of the patterns, any function from a text to the ends of its pieces, or the joints of a vocabulary.
class Splitter {
 public:
  using Function = std::function<std::vector<size_t>(std::string_view)>;

  explicit Splitter(Pattern pattern) : pattern_(pattern) {}
  explicit Splitter(Function function) : function_(std::move(function)) {}
  explicit Splitter(std::shared_ptr<const Joints> joints) : joints_(std::move(joints)) {}

  static constexpr size_t kBatch = 128;

  // batch(begin, ends, count) for at most kBatch pieces at a time, in order.
  template <class Batch>
  void for_each_batch(std::string_view text, Batch&& batch) const {
    PollEvery<256> poll;
    if (function_) {
      const std::vector<size_t> ends = function_(text);
      for (size_t i = 0; i < ends.size(); i += kBatch) {
        poll();
        batch(i == 0 ? 0 : ends[i - 1], &ends[i], std::min(kBatch, ends.size() - i));
      }
      return;
    }
    std::array<size_t, kBatch> ends;
    for (size_t begin = 0; begin < text.size();) {
      poll();
      size_t count;
      if (joints_ == nullptr) [[likely]] {
        count = split(pattern_, text, begin, ends.data(), ends.size());
      } else {
        count = joints_->split(text, begin, ends.data(), ends.size());
      }
      batch(begin, static_cast<const size_t*>(ends.data()), count);
      begin = ends[count - 1];
    }
  }

  // Nothing is known of a function, so it sees the whole of a text.
  size_t stable_prefix(std::string_view text) const {
    if (joints_) return joints_->stable_prefix(text);
    return function_ ? 0 : text::stable_prefix(pattern_, text);
  }
  // Null but for the joints of a vocabulary.
  const Joints* joints() const { return joints_.get(); }

 private:
  Pattern pattern_ = Pattern::kGpt2;
  Function function_;
  std::shared_ptr<const Joints> joints_;
};

}  // namespace cs336::text
