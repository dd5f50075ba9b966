// The patterns one piece at a time: what pretokenize.cpp does to 64 bytes at once, and falls back to.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "cpu/text/pretokenize.h"
#include "cpu/text/unicode.h"

namespace cs336::text {

using Ptr = const uint8_t*;

constexpr uint16_t kSymbol = kOther | kMark;  // [^\s\p{L}\p{N}]

inline bool is_ascii_letter(uint8_t byte) { return static_cast<uint8_t>((byte | 0x20) - 'a') < 26; }

inline Ptr ascii_letters(Ptr p, Ptr end) {
#ifdef __SSE2__
  for (; end - p >= 16; p += 16) {
    const __m128i lower = _mm_or_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(0x20));
    const __m128i offset = _mm_sub_epi8(lower, _mm_set1_epi8('a'));
    const __m128i is_letter = _mm_cmpeq_epi8(_mm_min_epu8(offset, _mm_set1_epi8(25)), offset);
    const int mask = _mm_movemask_epi8(is_letter);
    if (mask != 0xFFFF) return p + std::countr_one(static_cast<unsigned>(mask));
  }
#endif
  while (p < end && is_ascii_letter(*p)) ++p;
  return p;
}

// Past the letters at p.
inline Ptr letters(Ptr p, Ptr end) {
  for (;;) {
    p = ascii_letters(p, end);
    if (p == end || *p < 0x80) return p;
    const Char c = multibyte_at(p, end);
    if (!(c.cls & kLetter)) return p;
    p += c.size;
  }
}

// Past the characters of the classes in `mask` and of none in `without`.
inline Ptr run(Ptr p, Ptr end, uint16_t mask, uint16_t without = 0) {
  while (p < end) {
    const Char c = char_at(p, end);
    if (!(c.cls & mask) || c.cls & without) break;
    p += c.size;
  }
  return p;
}

// Up to `most` numbers.
inline Ptr few_numbers(Ptr p, Ptr end, int most) {
  for (int i = 0; i < most && p < end; ++i) {
    const Char c = char_at(p, end);
    if (!(c.cls & kNumber)) break;
    p += c.size;
  }
  return p;
}

struct Spaces {
  Ptr end;
  Ptr last;          // start of the last character
  Ptr last_newline;  // past the last \r or \n, or null
};

inline Spaces spaces(Ptr p, Ptr end) {
  Spaces s{p, p, nullptr};
  while (s.end < end) {
    const Char c = char_at(s.end, end);
    if (!(c.cls & kSpace)) break;
    s.last = s.end;
    s.end += c.size;
    if (c.cls & kNewline) s.last_newline = s.end;
  }
  return s;
}

// \s+(?!\S)|\s+: all of a run at the end of the text, else all but its last character, else that character.
inline Ptr leave_one(const Spaces& s, Ptr begin, Ptr end) { return s.end == end || s.last == begin ? s.end : s.last; }

// Past 's 't 'm 'd 're 've 'll, or p if there is none. Any case includes U+017F, the long s, which folds to s.
template <bool kAnyCase>
inline Ptr contraction(Ptr p, Ptr end) {
  if (end - p < 2 || *p != '\'') return p;
  const auto letter = [&](int i) -> uint8_t { return kAnyCase && p[i] >= 'A' && p[i] <= 'Z' ? p[i] | 0x20 : p[i]; };
  const uint8_t a = letter(1);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
  if (end - p < 3) return p;
  const uint8_t b = letter(2);
  if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return p + 3;
  if (kAnyCase && p[1] == 0xC5 && p[2] == 0xBF) return p + 3;
  return p;
}

// GPT-2's pattern. With kDigits each number is a piece of its own, cut off first: white space ends at it as at the end
// of the text.
template <bool kDigits>
struct Gpt2 {
  // Characters that only `next` knows how to place.
  static constexpr uint16_t kRare = kSpace | (kDigits ? kNumber : 0);
  static constexpr uint16_t kApart = 0;  // in words of their own

  static inline Ptr next(Ptr p, Ptr end) {
    if (const Ptr q = contraction<false>(p, end); q != p) return q;
    Char c = char_at(p, end);
    Ptr q = p;
    if (*p == ' ' && p + 1 < end) {
      const Char after = char_at(p + 1, end);
      if (!(after.cls & (kSpace | (kDigits ? kNumber : 0)))) {
        c = after;
        ++q;
      }
    }
    q += c.size;
    if (c.cls & kLetter) return letters(q, end);
    if (c.cls & kNumber) return kDigits ? q : run(q, end, kNumber);
    if (c.cls & kSymbol) return run(q, end, kSymbol);
    const Spaces s = spaces(p, end);
    if (kDigits && s.end < end && char_at(s.end, end).cls & kNumber) return s.end;
    return leave_one(s, p, end);
  }
};

// What the patterns of one family differ in. Those of cl100k: any letters make a word.
struct Cl100kRules {
  int numbers;        // \p{N}{1,numbers}
  bool whole_at_end;  // white space at the end of the text is one piece, newlines or not
};

template <Cl100kRules kRules>
struct Cl100k {
  static constexpr uint16_t kRare = kSpace | kNumber;
  static constexpr uint16_t kApart = 0;

  static inline Ptr next(Ptr p, Ptr end) {
    if (const Ptr q = contraction<true>(p, end); q != p) return q;
    const Char c = char_at(p, end);
    const Ptr q = p + c.size;
    if (c.cls & kLetter) return letters(q, end);
    if (c.cls & kNumber) return few_numbers(p, end, kRules.numbers);
    const Char after = q < end ? char_at(q, end) : Char{0, 0};
    if (after.cls & kLetter && !(c.cls & kNewline)) return letters(q + after.size, end);
    if (c.cls & kSymbol) return run(run(q, end, kSymbol), end, kNewline);
    if (after.cls & kSymbol && *p == ' ') return run(run(q + after.size, end, kSymbol), end, kNewline);
    const Spaces s = spaces(p, end);
    if (kRules.whole_at_end && s.end == end) return end;
    return s.last_newline != nullptr ? s.last_newline : leave_one(s, p, end);
  }
};

// Those of o200k: a word is capitals and then small letters.
struct O200kRules {
  int numbers;        // \p{N}{1,numbers}
  bool contractions;  // go with the word before them
  bool slashes;       // go with the symbols before them, as newlines do
  bool han_apart;     // \p{Han}+ is a piece, and no word has Han
};

template <O200kRules kRules>
struct O200k {
  static constexpr uint16_t kRare = kSpace | kNumber | kMark;
  static constexpr uint16_t kApart = kRules.han_apart ? kHan : 0;
  static constexpr uint16_t kCapital = kUpper | kCaseless | kMark;
  static constexpr uint16_t kSmall = kLower | kCaseless | kMark;

  // Past [capital]*[small]+ (kNeedSmall) or, where that fails, [capital]+[small]*; p if neither matches.
  // A caseless letter or a mark is of both classes: the first form may give back capitals up to the last of them.
  template <bool kNeedSmall>
  static inline Ptr word(Ptr p, Ptr end) {
    Ptr q = p, last_of_both = p;
    while (q < end) {
      const Char c = char_at(q, end);
      if (c.cls & kApart) break;
      if (!(c.cls & kCapital)) {
        if (c.cls & kLower) return run(q + c.size, end, kSmall, kApart);
        break;
      }
      q += c.size;
      if (c.cls & kSmall) last_of_both = q;
    }
    return kNeedSmall ? last_of_both : q;
  }

  static inline Ptr next(Ptr p, Ptr end) {
    const Char c = char_at(p, end);
    const Ptr q = p + c.size;
    if (c.cls & kApart) return run(q, end, kHan);
    const bool can_lead = !(c.cls & (kNewline | kLetter | kNumber));
    const bool can_start = c.cls & (kLetter | kMark);
    if (can_lead && q < end) {
      if (const Ptr e = word<true>(q, end); e != q) return suffix(e, end);
    }
    if (can_start) {
      if (const Ptr e = word<true>(p, end); e != p) return suffix(e, end);
    }
    if (can_lead && q < end) {
      if (const Ptr e = word<false>(q, end); e != q) return suffix(e, end);
    }
    if (can_start) return suffix(word<false>(p, end), end);
    if (c.cls & kNumber) return few_numbers(p, end, kRules.numbers);
    if (c.cls & kSymbol) return symbols(q, end);
    if (*p == ' ' && q < end) {
      if (const Char after = char_at(q, end); after.cls & kSymbol) return symbols(q + after.size, end);
    }
    const Spaces s = spaces(p, end);
    return s.last_newline != nullptr ? s.last_newline : leave_one(s, p, end);
  }

  static inline Ptr suffix(Ptr p, Ptr end) { return kRules.contractions ? contraction<true>(p, end) : p; }

  // [^\s\p{L}\p{N}]*[\r\n/]*
  static inline Ptr symbols(Ptr p, Ptr end) {
    p = run(p, end, kSymbol);
    while (p < end && (*p == '\r' || *p == '\n' || (kRules.slashes && *p == '/'))) ++p;
    return p;
  }
};

// DeepSeek's three splits, one after the other: \p{N}{1,3}, then runs of kCjk, then an expression, which sees each part
// as a text of its own. So numbers end a part, and so does a change between kCjk and others.
struct DeepSeek {
  static inline Ptr next(Ptr p, Ptr end) {
    const Char c = char_at(p, end);
    if (c.cls & kNumber) return few_numbers(p, end, 3);
    const Part part{c.cls & kCjk, end};
    if (const Ptr e = part.match(p, c); e != p) return e;
    for (Ptr q = p + c.size;;) {  // what the expression leaves out is one piece, up to what it finds
      const Char other = part.at(q);
      if (other.size == 0 || part.match(q, other) != q) return q;
      q += other.size;
    }
  }

 private:
  struct Part {
    int cjk;
    Ptr end;

    // The character at p, of no class and no size where the part ends.
    Char at(Ptr p) const {
      if (p == end) return {0, 0};
      const Char c = char_at(p, end);
      return c.cls & kNumber || (c.cls & kCjk) != cjk ? Char{0, 0} : c;
    }
    Ptr run(Ptr p, uint16_t mask) const {
      for (Char c; (c = at(p)).cls & mask;) p += c.size;
      return p;
    }

    // Past what the expression matches at p, where c is; p if it does not.
    Ptr match(Ptr p, Char c) const {
      const Ptr q = p + c.size;
      const Char after = at(q);
      if (*p < 0x80 && c.cls & kPunctuation && q < end && is_ascii_letter(*q)) return ascii_letters(q, end);
      const bool can_lead = !(c.cls & (kNewline | kLetter | kPunctuation));
      if (can_lead && after.cls & (kLetter | kMark)) return run(q + after.size, kLetter | kMark);
      if (c.cls & (kLetter | kMark)) return run(q, kLetter | kMark);
      if (c.cls & kPunctuation) return run(run(q, kPunctuation), kNewline);
      if (*p == ' ' && after.cls & kPunctuation) return run(run(q + after.size, kPunctuation), kNewline);
      if (!(c.cls & kSpace)) return p;
      Spaces s{p, p, nullptr};
      for (Char space = c; space.cls & kSpace; space = at(s.end)) {
        s.last = s.end;
        s.end += space.size;
        if (space.cls & kNewline) s.last_newline = s.end;
      }
      if (s.last_newline != nullptr) return s.last_newline;
      return at(s.end).size == 0 || s.last == p ? s.end : s.last;
    }
  };
};

// ---- the patterns ----

// visit(the scanner of a pattern).
template <class Visit>
auto with_scanner(Pattern pattern, Visit&& visit) {
  switch (pattern) {
    case Pattern::kGpt2:
      return visit(Gpt2<false>{});
    case Pattern::kGpt2Digits:
      return visit(Gpt2<true>{});
    case Pattern::kCl100k:
      return visit(Cl100k<Cl100kRules{.numbers = 3, .whole_at_end = true}>{});
    case Pattern::kLlama3:
      return visit(Cl100k<Cl100kRules{.numbers = 3, .whole_at_end = false}>{});
    case Pattern::kQwen2:
      return visit(Cl100k<Cl100kRules{.numbers = 1, .whole_at_end = false}>{});
    case Pattern::kO200k:
      return visit(O200k<O200kRules{.numbers = 3, .contractions = true, .slashes = true, .han_apart = false}>{});
    case Pattern::kTekken:
      return visit(O200k<O200kRules{.numbers = 1, .contractions = false, .slashes = true, .han_apart = false}>{});
    case Pattern::kKimi:
      return visit(O200k<O200kRules{.numbers = 3, .contractions = true, .slashes = false, .han_apart = true}>{});
    case Pattern::kDeepSeek:
      return visit(DeepSeek{});
  }
  throw std::logic_error("unknown pattern");
}

}  // namespace cs336::text
