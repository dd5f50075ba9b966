// The patterns one piece at a time: what pretokenize.cpp does to 64 bytes at once, and falls back to.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "cpu/text/unicode.h"

namespace cs336::text {

using Ptr = const uint8_t*;

constexpr uint8_t kSymbol = kOther | kMark;  // [^\s\p{L}\p{N}]

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

// Past the characters of the classes in `mask`.
inline Ptr run(Ptr p, Ptr end, uint8_t mask) {
  while (p < end) {
    const Char c = char_at(p, end);
    if (!(c.cls & mask)) break;
    p += c.size;
  }
  return p;
}

// Up to three numbers.
inline Ptr few_numbers(Ptr p, Ptr end) {
  for (int i = 0; i < 3 && p < end; ++i) {
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

struct Gpt2 {
  // Characters that only `next` knows how to place.
  static constexpr uint8_t kRare = kSpace;

  static inline Ptr next(Ptr p, Ptr end) {
    if (const Ptr q = contraction<false>(p, end); q != p) return q;
    Char c = char_at(p, end);
    Ptr q = p;
    if (*p == ' ' && p + 1 < end) {
      const Char after = char_at(p + 1, end);
      if (!(after.cls & kSpace)) {
        c = after;
        ++q;
      }
    }
    q += c.size;
    if (c.cls & kLetter) return letters(q, end);
    if (c.cls & kNumber) return run(q, end, kNumber);
    if (c.cls & kSymbol) return run(q, end, kSymbol);
    return leave_one(spaces(p, end), p, end);
  }
};

struct Cl100k {
  static constexpr uint8_t kRare = kSpace | kNumber;

  static inline Ptr next(Ptr p, Ptr end) {
    if (const Ptr q = contraction<true>(p, end); q != p) return q;
    const Char c = char_at(p, end);
    const Ptr q = p + c.size;
    if (c.cls & kLetter) return letters(q, end);
    if (c.cls & kNumber) return few_numbers(p, end);
    const Char after = q < end ? char_at(q, end) : Char{0, 0};
    if (after.cls & kLetter && !(c.cls & kNewline)) return letters(q + after.size, end);
    if (c.cls & kSymbol) return run(run(q, end, kSymbol), end, kNewline);
    if (after.cls & kSymbol && *p == ' ') return run(run(q + after.size, end, kSymbol), end, kNewline);
    const Spaces s = spaces(p, end);
    if (s.end == end) return end;
    return s.last_newline != nullptr ? s.last_newline : leave_one(s, p, end);
  }
};

struct O200k {
  static constexpr uint8_t kRare = kSpace | kNumber | kMark;
  static constexpr uint8_t kCapital = kUpper | kCaseless | kMark;
  static constexpr uint8_t kSmall = kLower | kCaseless | kMark;

  // Past [capital]*[small]+ (kNeedSmall) or, where that fails, [capital]+[small]*; p if neither matches.
  // A caseless letter or a mark is of both classes: the first form may give back capitals up to the last of them.
  template <bool kNeedSmall>
  static inline Ptr word(Ptr p, Ptr end) {
    Ptr q = p, last_of_both = p;
    while (q < end) {
      const Char c = char_at(q, end);
      if (!(c.cls & kCapital)) {
        if (c.cls & kLower) return run(q + c.size, end, kSmall);
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
    const bool can_lead = !(c.cls & (kNewline | kLetter | kNumber));
    const bool can_start = c.cls & (kLetter | kMark);
    if (can_lead && q < end) {
      if (const Ptr e = word<true>(q, end); e != q) return contraction<true>(e, end);
    }
    if (can_start) {
      if (const Ptr e = word<true>(p, end); e != p) return contraction<true>(e, end);
    }
    if (can_lead && q < end) {
      if (const Ptr e = word<false>(q, end); e != q) return contraction<true>(e, end);
    }
    if (can_start) return contraction<true>(word<false>(p, end), end);
    if (c.cls & kNumber) return few_numbers(p, end);
    if (c.cls & kSymbol) return symbols(q, end);
    if (*p == ' ' && q < end) {
      if (const Char after = char_at(q, end); after.cls & kSymbol) return symbols(q + after.size, end);
    }
    const Spaces s = spaces(p, end);
    return s.last_newline != nullptr ? s.last_newline : leave_one(s, p, end);
  }

  // [^\s\p{L}\p{N}]*[\r\n/]*
  static inline Ptr symbols(Ptr p, Ptr end) {
    p = run(p, end, kSymbol);
    while (p < end && (*p == '\r' || *p == '\n' || *p == '/')) ++p;
    return p;
  }
};

}  // namespace cs336::text
