#include "cpu/text/pretokenize.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>

#include "cpu/text/byte_masks.h"
#include "cpu/text/scanners.h"

namespace cs336::text {
namespace {

constexpr uint64_t bit(ptrdiff_t i) { return i < 64 ? uint64_t{1} << i : 0; }

// Where pieces start in 64 bytes, by operations on masks with one bit a byte. The block begins where a piece does, so
// that nothing before it matters. All bytes of a character carry its class.
class Block {
 public:
  template <class Scanner>
  static uint64_t starts(Ptr begin, Ptr end) {
    uint8_t padded[64];
    if (end - begin < 64) {
      const auto size = static_cast<size_t>(end - begin);
      std::memset(padded, 0, sizeof(padded));
      std::memcpy(padded, begin, size);
      begin = padded, end = padded + size;
    }
    Block block(begin, end);
    block.limit_to_white_at_end();
    block.add_multibyte(Scanner{});
    const uint64_t starts = block.starts(Scanner{});
    return starts & (bit(block.limit_) - 1);
  }

 private:
  Block(Ptr begin, Ptr end) : begin_(begin), end_(end), is_(classify(begin)) {}

  // What a run of white space that reaches the end of the block falls into depends on what follows it.
  void limit_to_white_at_end() {
    limit_ = std::min<int>(64, static_cast<int>(end_ - begin_));
    limit_ -= std::countl_one(is_.white << (64 - limit_));
  }
  void limit_to(int position) { limit_ = std::min(limit_, position); }

  template <class Scanner>
  void add_multibyte(Scanner) {
    if (is_.high == 0) return;
    const uint64_t first = ideographs(begin_);
    tail_ = first << 1 | first << 2;
    (Scanner::kApart ? apart_ : caseless_) = first | tail_;
    for (uint64_t left = is_.high & ~(first | tail_); left != 0;) {
      const int i = std::countr_zero(left);
      if (i >= limit_) break;
      const Char c = multibyte_at(begin_ + i, end_);
      const uint64_t bytes = bit(i + c.size) - bit(i);
      left &= ~bytes;
      tail_ |= bytes & ~bit(i);
      if (c.cls & Scanner::kApart) {
        if (!(c.cls & kLetter)) {
          limit_to(i);
          break;
        }
        apart_ |= bytes;
        continue;
      }
      if (c.cls & kLetter) is_.letter |= bytes;
      if (c.cls & kLower) is_.lower |= bytes;
      if (c.cls & kUpper) is_.upper |= bytes;
      if (c.cls & kCaseless) caseless_ |= bytes;
      if (c.cls & kNumber) is_.number |= bytes;
      if (c.cls & kSpace) is_.white |= bytes;
      if (c.cls & Scanner::kRare) limit_to(c.cls & kSpace ? run_start(is_.white, i) : i);
    }
  }

  uint64_t letters() const { return is_.letter | caseless_; }
  uint64_t symbols() const { return ~(letters() | apart_ | is_.number | is_.white); }
  static uint64_t run_starts(uint64_t mask) { return mask & ~(mask << 1); }
  // Of the run that ends before bit i.
  static int run_start(uint64_t mask, int i) { return 64 - std::countl_zero(~mask & (bit(i) - 1)); }

  template <bool kDigits>
  uint64_t starts(Gpt2<kDigits>) {
    const uint64_t white = is_.white;
    uint64_t starts = run_starts(letters()) | run_starts(is_.number) | run_starts(symbols());
    starts &= ~(is_.space << 1);                            // a space goes with what follows it
    starts |= run_starts(white) | (white & ~(white >> 1));  // the last of a run is a piece, or that space
    if (kDigits) starts = (starts & ~(white & (white << 1) & (is_.number >> 1))) | is_.number;
    for (uint64_t left = is_.apostrophe & starts; left != 0; left &= left - 1) {
      const int i = std::countr_zero(left);
      const ptrdiff_t e = contraction<false>(begin_ + i, end_) - begin_;
      if (e != i) starts = (starts & ~(bit(e) - bit(i + 1))) | bit(e);
    }
    return starts;
  }

  // What cl100k's family and o200k's have in common. Sets `glued`: newlines that belong to the symbols before them.
  uint64_t common_starts(int numbers, uint64_t& glued) {
    const uint64_t letter = letters(), number = is_.number, symbol = symbols();
    const uint64_t after_symbol = is_.newline & (symbol << 1);
    glued = ((is_.newline + after_symbol) ^ is_.newline) & is_.newline;
    const uint64_t white = is_.white & ~glued, newline = is_.newline & ~glued, blank = is_.white & ~is_.newline;

    // White space: up to the last newline of a run, then all but the last blank, then that.
    uint64_t starts = run_starts(white) | ((newline << 1) & ~newline) | (blank & ~(is_.white >> 1));
    const uint64_t blank_lines = (blank + (blank & (newline << 1))) & ~blank & is_.newline;
    if (blank_lines != 0) {  // the newline before them is not the last of its run
      limit_to(run_start(blank, std::countr_zero(blank_lines)));
    }

    // Symbols, a space before them included. One alone belongs to the letters after it, as a blank does.
    const uint64_t symbol_starts = run_starts(symbol) & ~(is_.space << 1);
    const uint64_t second = symbol_starts << 1;
    const uint64_t after_one = (second & ~tail_) | ((tail_ + (second & tail_)) & ~tail_);
    starts |= symbol_starts | (run_starts(letter) & ~after_one & ~(blank << 1));

    if (numbers == 1) return starts | number;
    const uint64_t goes_on = number & (number << 1) & (number << 2);
    for (uint64_t threes = run_starts(number); threes != 0; threes = (threes << 3) & goes_on) starts |= threes;
    return starts;
  }

  template <Cl100kRules kRules>
  uint64_t starts(Cl100k<kRules>) {
    uint64_t glued;
    uint64_t starts = common_starts(kRules.numbers, glued);
    for (uint64_t left = is_.apostrophe & starts; left != 0; left &= left - 1) {
      const int i = std::countr_zero(left);
      const ptrdiff_t e = contraction<true>(begin_ + i, end_) - begin_;
      if (e != i) starts |= bit(e);
    }
    return starts;
  }

  template <O200kRules kRules>
  uint64_t starts(O200k<kRules>) {
    uint64_t glued;
    uint64_t starts = common_starts(kRules.numbers, glued) | run_starts(apart_);
    for (uint64_t left = kRules.slashes ? (glued << 1) & symbols() : 0; left != 0; left &= left - 1) {
      const int i = std::countr_zero(left);
      if (begin_[i] == '/') limit_to(i);
    }
    starts |= is_.upper & (is_.lower << 1);
    if (const uint64_t mixed = is_.upper & (caseless_ << 1)) limit_to(std::countr_zero(mixed));
    ptrdiff_t last = -1;
    for (uint64_t left = kRules.contractions ? is_.apostrophe & (letters() << 1) : 0; left != 0; left &= left - 1) {
      const int i = std::countr_zero(left);
      if (i == last) continue;  // a word takes one contraction
      const ptrdiff_t e = contraction<true>(begin_ + i, end_) - begin_;
      if (e == i) continue;
      starts = (starts & ~(bit(e) - bit(i))) | bit(e);
      last = e;
    }
    return starts;
  }

  Ptr begin_, end_;
  ByteMasks is_;
  uint64_t caseless_ = 0;
  uint64_t apart_ = 0;  // letters that are in words of their own
  uint64_t tail_ = 0;   // bytes of characters after their first
  int limit_ = 64;      // what starts at and after it is not known
};

template <class Scanner>
size_t split_with(Scanner, std::string_view text, size_t begin, size_t* ends, size_t capacity) {
  const Ptr base = reinterpret_cast<Ptr>(text.data()), end = base + text.size();
  Ptr p = base + begin;
  size_t count = 0;
  if constexpr (!requires { Scanner::kRare; }) {  // one piece at a time
    while (p < end && count < capacity) {
      p = Scanner::next(p, end);
      ends[count++] = static_cast<size_t>(p - base);
    }
  } else {
    while (p < end && count + 64 <= capacity) {
      uint64_t starts = Block::starts<Scanner>(p, end) & ~uint64_t{1};
      if (starts == 0) {
        p = Scanner::next(p, end);
        ends[count++] = static_cast<size_t>(p - base);
        continue;
      }
      const auto offset = static_cast<size_t>(p - base);
      p += 63 - std::countl_zero(starts);
      for (; starts != 0; starts &= starts - 1) ends[count++] = offset + static_cast<size_t>(std::countr_zero(starts));
    }
  }
  return count;
}

// The class of the character that ends just before p.
uint16_t class_before(Ptr begin, Ptr p, Ptr end) {
  Ptr q = p - 1;
  while (q > begin && p - q < 4 && (*q & 0xC0) == 0x80) --q;
  const Char c = char_at(q, end);
  return q + c.size == p ? c.cls : uint16_t{kOther};
}

}  // namespace

std::optional<Pattern> pattern_named(std::string_view name) {
  const auto* const found = std::find(std::begin(kPatternNames), std::end(kPatternNames), name);
  if (found == std::end(kPatternNames)) return std::nullopt;
  return static_cast<Pattern>(found - std::begin(kPatternNames));
}

size_t split(Pattern pattern, std::string_view text, size_t begin, size_t* ends, size_t capacity) {
  return with_scanner(pattern, [&](auto scanner) { return split_with(scanner, text, begin, ends, capacity); });
}

size_t stable_prefix(Pattern pattern, std::string_view text) {
  const Ptr base = reinterpret_cast<Ptr>(text.data()), end = base + text.size();
  // Nearly always there is a space after something else nearby: no piece goes across.
  const Ptr nearby = end - std::min<ptrdiff_t>(end - base, 4096);
  for (Ptr p = end; --p > nearby;) {
    if (*p != ' ' && *p != '\n') continue;
    const uint8_t before = class_before(base, p, end);
    if (before & (kLetter | kNumber) || (*p == ' ' && !(before & kSpace))) return static_cast<size_t>(p - base);
  }
  // Else the last piece that is sure to end where it does. What a pattern looks at past the end of a piece is a run of
  // white space, a run of letters and marks, or at most four bytes (a contraction, a character).
  constexpr size_t kLookahead = 4;
  std::array<size_t, 256> ends;
  size_t stable = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t count = split(pattern, text, begin, ends.data(), ends.size());
    for (size_t i = 0; i < count && ends[i] + kLookahead <= text.size(); ++i) {
      const bool runs_on = char_at(base + ends[i], end).cls & (kLetter | kMark);
      if (!runs_on && !(class_before(base, base + ends[i], end) & kSpace)) stable = ends[i];
    }
    begin = ends[count - 1];
  }
  return stable;
}

}  // namespace cs336::text
