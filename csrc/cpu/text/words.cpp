#include "cpu/text/words.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <unordered_set>

#include "cpu/text/unicode.h"

namespace cs336::text {
namespace {

// What a character does at the ends of a word, as bits.
enum Edge : uint8_t {
  kPrefix = 1,      // is taken off the front
  kSuffix = 2,      // is taken off the end
  kBeforeStop = 4,  // a full stop after it ends the word's sentence: "end." but not "U.S."
  kSymbol = 8,      // punctuation by the rules
  kHyphen = 16,     // parts letters
};

constexpr std::string_view kPunctuation = ",:;!?()[]{}<>_#*&";
constexpr std::string_view kQuotes = "'\"`";

constexpr std::array<uint8_t, 128> kAsciiEdges = [] {
  std::array<uint8_t, 128> edges{};
  for (int c = 0; c < 128; ++c) {
    const bool alnum = (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z');
    if (!alnum && c != ' ' && c != '\t' && c != '\n') edges[c] |= kSymbol;
    if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z')) edges[c] |= kBeforeStop;
  }
  for (const std::string_view set : {kPunctuation, kQuotes}) {
    for (const char c : set) edges[static_cast<size_t>(c)] |= kPrefix | kSuffix | kBeforeStop;
  }
  for (const char c : {'%', '=', '$'}) edges[static_cast<size_t>(c)] |= kPrefix;
  for (const char c : {'%', '+', '-'}) edges[static_cast<size_t>(c)] |= kBeforeStop;
  for (const char c : {'-', '~'}) edges[static_cast<size_t>(c)] |= kHyphen;
  return edges;
}();

struct Range {
  uint32_t first, last;
};

// Quotes, brackets and marks of other scripts that are taken off both ends.
constexpr Range kBothEnds[] = {
    {0xA1, 0xA1},     {0xAB, 0xAB},     {0xB4, 0xB4},     {0xB7, 0xB7},     {0xBB, 0xBB},
    {0xBF, 0xBF},     {0x61B, 0x61B},   {0x61F, 0x61F},   {0x66A, 0x66A},   {0x6D4, 0x6D4},
    {0x60C, 0x60C},   {0x964, 0x964},   {0x2018, 0x201A}, {0x201C, 0x201E}, {0x2026, 0x2026},
    {0x2039, 0x203A}, {0x3001, 0x3002}, {0x3008, 0x3011}, {0x3014, 0x3015}, {0xFF01, 0xFF01},
    {0xFF08, 0xFF09}, {0xFF0C, 0xFF0C}, {0xFF1A, 0xFF1B}, {0xFF1F, 0xFF1F}, {0xFF5E, 0xFF5E}};
constexpr Range kFrontOnly[] = {{0xA2, 0xA5}, {0xA7, 0xA7}, {0x20A0, 0x20C0}};  // money, section
constexpr Range kDashes[] = {{0x2013, 0x2014}};
// So: pictures are words of their own.
constexpr Range kPictures[] = {{0xA6, 0xA6},     {0xA9, 0xA9},     {0xAE, 0xAE},      {0xB0, 0xB0},
                               {0x2100, 0x214F}, {0x2190, 0x21FF}, {0x2300, 0x23FF},  {0x2400, 0x25FF},
                               {0x2600, 0x27BF}, {0x2800, 0x2BFF}, {0x1F000, 0x1FAFF}};
// Punctuation by the rules: what no word that counts may be made of alone.
constexpr Range kSymbols[] = {{0x80, 0x9F},     {0xAB, 0xAB},     {0xB4, 0xB4},     {0xBB, 0xBB},     {0x2013, 0x2014},
                              {0x2019, 0x2019}, {0x201C, 0x201E}, {0x2026, 0x2026}, {0x2236, 0x2236}, {0x2501, 0x2501},
                              {0x25BA, 0x25BA}, {0x3001, 0x3002}, {0x3008, 0x300D}, {0x3010, 0x3011}, {0xFF01, 0xFF01},
                              {0xFF05, 0xFF05}, {0xFF08, 0xFF09}, {0xFF0C, 0xFF0C}, {0xFF0E, 0xFF0E}, {0xFF11, 0xFF11},
                              {0xFF1A, 0xFF1B}, {0xFF1F, 0xFF1F}, {0xFF5E, 0xFF5E}};
// clang-format off
constexpr Range kSentenceEnds[] = {
    {0x21, 0x21}, {0x2e, 0x2e}, {0x3f, 0x3f}, {0x589, 0x589}, {0x61d, 0x61f}, {0x6d4, 0x6d4}, {0x700, 0x702},
    {0x7f9, 0x7f9}, {0x837, 0x837}, {0x839, 0x839}, {0x83d, 0x83e}, {0x964, 0x965}, {0x104a, 0x104b}, {0x1362, 0x1362},
    {0x1367, 0x1368}, {0x166e, 0x166e}, {0x1735, 0x1736}, {0x17d4, 0x17d6}, {0x17d9, 0x17da}, {0x1803, 0x1803},
    {0x1809, 0x1809}, {0x1944, 0x1945}, {0x1aa8, 0x1aab}, {0x1b5a, 0x1b5b}, {0x1b5e, 0x1b5f}, {0x1b7d, 0x1b7e},
    {0x1c3b, 0x1c3c}, {0x1c7e, 0x1c7f}, {0x203c, 0x203d}, {0x2047, 0x2049}, {0x2e2e, 0x2e2e}, {0x2e3c, 0x2e3c},
    {0x2e53, 0x2e54}, {0x3002, 0x3002}, {0xa4ff, 0xa4ff}, {0xa60e, 0xa60f}, {0xa6f3, 0xa6f3}, {0xa6f7, 0xa6f7},
    {0xa876, 0xa877}, {0xa8ce, 0xa8cf}, {0xa92f, 0xa92f}, {0xa9c8, 0xa9c9}, {0xaa5d, 0xaa5f}, {0xaaf0, 0xaaf1},
    {0xabeb, 0xabeb}, {0xfe52, 0xfe52}, {0xfe56, 0xfe57}, {0xff01, 0xff01}, {0xff0e, 0xff0e}, {0xff1f, 0xff1f},
    {0xff61, 0xff61}, {0x10a56, 0x10a57}, {0x10f55, 0x10f59}, {0x10f86, 0x10f89}, {0x11047, 0x11048},
    {0x110be, 0x110c1}, {0x11141, 0x11143}, {0x111c5, 0x111c6}, {0x111cd, 0x111cd}, {0x111de, 0x111df},
    {0x11238, 0x11239}, {0x1123b, 0x1123c}, {0x112a9, 0x112a9}, {0x1144b, 0x1144c}, {0x115c2, 0x115c3},
    {0x115c9, 0x115d7}, {0x11641, 0x11642}, {0x1173c, 0x1173e}, {0x11944, 0x11944}, {0x11946, 0x11946},
    {0x11a42, 0x11a43}, {0x11a9b, 0x11a9c}, {0x11c41, 0x11c42}, {0x11ef7, 0x11ef8}, {0x11f43, 0x11f44},
    {0x16a6e, 0x16a6f}, {0x16af5, 0x16af5}, {0x16b37, 0x16b38}, {0x16b44, 0x16b44}, {0x16e98, 0x16e98},
    {0x1bc9f, 0x1bc9f}, {0x1da88, 0x1da88}};
// clang-format on

template <size_t N>
bool within(const Range (&ranges)[N], uint32_t code) {
  const Range* after = std::upper_bound(ranges, ranges + N, code, [](uint32_t c, Range r) { return c < r.first; });
  return after != ranges && code <= after[-1].last;
}

uint8_t edges_of(uint32_t code) {
  if (code < 0x80) return kAsciiEdges[code];
  uint8_t edges = within(kSymbols, code) || within(kSentenceEnds, code) ? kSymbol : 0;
  if (within(kBothEnds, code)) edges |= kPrefix | kSuffix | kBeforeStop;
  if (within(kPictures, code)) edges |= kPrefix | kSuffix;
  if (within(kFrontOnly, code)) edges |= kPrefix;
  if (within(kDashes, code)) edges |= kPrefix | kSuffix | kHyphen;
  if (kClassOf[code] & kLower) edges |= kBeforeStop;
  return edges;
}

CodePoint first_char(std::string_view text) {
  const auto* p = reinterpret_cast<const uint8_t*>(text.data());
  if (*p < 0x80) return {*p, 1};
  const CodePoint c = decode_multibyte(p, p + text.size());
  return c.size == 0 ? CodePoint{0xFFFD, 1} : c;
}

CodePoint last_char(std::string_view text) {
  size_t size = 1;
  while (size < 4 && size < text.size() && (text[text.size() - size] & 0xC0) == 0x80) ++size;
  const CodePoint c = first_char(text.substr(text.size() - size));
  return c.size == size ? c : CodePoint{0xFFFD, 1};
}

bool is_letter(uint32_t code) { return kClassOf[code] & kLetter; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Words that keep their full stop, in lower case without it.
const std::unordered_set<std::string_view> kAbbreviations = {
    "mr",   "mrs", "ms",    "dr",   "prof", "st",   "jr",   "sr",   "inc",  "co",   "corp",   "ltd",  "vs",  "e.g",
    "i.e",  "a.m", "p.m",   "jan",  "feb",  "mar",  "apr",  "jun",  "jul",  "aug",  "sep",    "sept", "oct", "nov",
    "dec",  "gov", "gen",   "sen",  "rep",  "rev",  "mt",   "bros", "adm",  "ph.d", "messrs", "v.s",  "o.o", "ala",
    "ariz", "ark", "calif", "colo", "conn", "del",  "fla",  "ga",   "ia",   "id",   "ill",    "ind",  "kan", "kans",
    "ky",   "la",  "mass",  "md",   "mich", "minn", "miss", "mo",   "mont", "n.c",  "n.d",    "n.h",  "n.j", "n.m",
    "n.y",  "neb", "nebr",  "nev",  "okla", "ore",  "pa",   "s.c",  "tenn", "va",   "wash",   "wis",  "d.c"};
const std::unordered_set<std::string_view> kNegated = {
    "ai",  "are",   "ca",   "can",  "could", "did", "does",   "do",  "had",  "has", "have",  "is",
    "may", "might", "must", "need", "ought", "sha", "should", "was", "were", "wo",  "would", "dare"};
const std::unordered_set<std::string_view> kPronouns = {"i",    "you",   "he",   "she",  "it",    "we",
                                                        "they", "who",   "what", "when", "where", "why",
                                                        "how",  "there", "that", "this", "these", "those"};
const std::unordered_set<std::string_view> kModals = {"could", "might", "must", "should", "would"};

// Nearly no word may: an apostrophe, or the end of "dont", "cannot", "gonna", "gotta".
bool may_contract(std::string_view word) {
  const char last = static_cast<char>(word.back() | 32), before = static_cast<char>(word[word.size() - 2] | 32);
  return (last == 't' && (before == 'n' || before == 'o')) || (last == 'a' && (before == 'n' || before == 't')) ||
         word.find('\'') != word.npos || word.find('\xE2') != word.npos;
}

// Splits of one word by its lower-case form; 0 where it stays whole.
size_t contraction(std::string_view word) {
  char buffer[16];
  if (word.size() < 3 || word.size() > sizeof(buffer) || !may_contract(word)) return 0;
  std::transform(word.begin(), word.end(), buffer,
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 32) : c; });
  const std::string_view lower(buffer, word.size());
  if (lower == "cannot" || lower == "gonna" || lower == "gotta") return 3;
  for (const std::string_view ending : {"n't", "n\xE2\x80\x99t", "nt"}) {
    if (lower.ends_with(ending) && kNegated.contains(lower.substr(0, lower.size() - ending.size()))) {
      const std::string_view stem = lower.substr(0, lower.size() - ending.size());
      if (ending == "nt" && (stem == "ca" || stem == "wo" || stem.size() < 2)) continue;
      return stem.size();
    }
  }
  const size_t mark = lower.find_first_of("'\xE2");
  if (mark == lower.npos) return 0;
  const size_t size = lower[mark] == '\'' ? 1 : 3;
  if (mark + size > lower.size()) return 0;
  const std::string_view stem = lower.substr(0, mark), ending = lower.substr(mark + size);
  const bool pronoun = kPronouns.contains(stem) && (ending == "ll" || ending == "d" || ending == "ve" ||
                                                    ending == "re" || ending == "m" || ending == "s");
  return pronoun || (kModals.contains(stem) && ending == "ve") ? mark : 0;
}

bool keeps_stop(std::string_view word) {
  char buffer[8];
  const std::string_view stem = word.substr(0, word.size() - 1);
  if (stem.empty() || stem.size() > sizeof(buffer)) return false;
  std::transform(stem.begin(), stem.end(), buffer,
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 32) : c; });
  if (stem.size() == 1) return buffer[0] >= 'a' && buffer[0] <= 'z';
  const bool written_so =
      (stem[0] >= 'A' && stem[0] <= 'Z') || stem.find('.') != stem.npos || stem == "vs" || stem == "co";
  return written_so && kAbbreviations.contains({buffer, stem.size()});
}

constexpr std::array<bool, 256> kAsciiLetter = [] {
  std::array<bool, 256> table{};
  for (int c = 'a'; c <= 'z'; ++c) table[c] = table[c - 32] = true;
  return table;
}();

// Not the full stop, which abbreviations keep.
bool is_plain_mark(char c) { return c == ',' || c == ';' || c == ':' || c == '!' || c == '?' || c == ')'; }

class Splitter {
 public:
  Splitter(std::vector<Word>& words) : words_(words) {}

  // One run of visible characters.
  void split(std::string_view chunk) {
    suffixes_.clear();
    while (!chunk.empty()) {
      if (is_emoticon(chunk)) break;
      if (const size_t at = contraction(chunk); at > 0) {
        add(chunk.substr(0, at));
        chunk.remove_prefix(at);
        break;
      }
      if (chunk.back() == '.' && keeps_stop(chunk)) break;
      const size_t front = prefix(chunk);
      if (front > 0) {
        add(chunk.substr(0, front));
        chunk.remove_prefix(front);
        if (chunk.empty()) break;
        if (contraction(chunk) > 0 || (chunk.back() == '.' && keeps_stop(chunk))) continue;
      }
      const size_t end = suffix(chunk);
      if (end > 0) {
        suffixes_.push_back(chunk.substr(chunk.size() - end));
        chunk.remove_suffix(end);
      }
      if (front == 0 && end == 0) {
        split_inside(chunk);
        chunk = {};
      }
    }
    if (!chunk.empty()) add(chunk);
    for (size_t i = suffixes_.size(); i-- > 0;) add(suffixes_[i]);
  }

 private:
  static bool is_emoticon(std::string_view chunk) {
    static const std::unordered_set<std::string_view> kEmoticons = {
        ":)", ":(", ":D",  ":P",  ":p",  ":/",  ":|",  ":o",  ":O",  ":x",  ":*",   ";)",  ";D",  "=)",  "=(",
        "=D", "<3", "<33", ":-)", ":-(", ":-D", ":-P", ":-/", ";-)", ":))", ":)))", ":((", ":'(", ":')", "):",
        "(:", "(;", "</3", ":]",  "8)",  "8-)", "xD",  "XD",  "^_^", "^^",  "-_-",  "o_o", "o.O"};
    return chunk.size() <= 5 && kEmoticons.contains(chunk);
  }

  static size_t dots_at(std::string_view text, size_t at) {
    size_t size = 0;
    while (at + size < text.size() && text[at + size] == '.') ++size;
    return size >= 2 ? size : 0;
  }

  static size_t prefix(std::string_view chunk) {
    if (const size_t dots = dots_at(chunk, 0)) return dots;
    const CodePoint c = first_char(chunk);
    if (edges_of(c.code) & kPrefix) return c.size;
    return c.code == '+' && !(chunk.size() > 1 && is_digit(chunk[1])) ? 1 : 0;
  }

  static size_t suffix(std::string_view chunk) {
    if (chunk.ends_with("'s") || chunk.ends_with("'S")) return 2;
    if (chunk.ends_with("\xE2\x80\x99s") || chunk.ends_with("\xE2\x80\x99S")) return 4;
    const CodePoint c = last_char(chunk);
    if (edges_of(c.code) & kSuffix) return c.size;
    if (chunk.size() == c.size) return 0;
    const std::string_view rest = chunk.substr(0, chunk.size() - c.size);
    const bool digit = is_digit(rest.back());
    if (c.code == '.') {
      size_t dots = 1;
      while (dots < chunk.size() && chunk[chunk.size() - dots - 1] == '.') ++dots;
      if (dots > 1) return dots;
      const CodePoint before = last_char(rest);
      if (edges_of(before.code) & kBeforeStop) return 1;
      const bool two_upper = kClassOf[before.code] & kUpper && rest.size() > before.size &&
                             kClassOf[last_char(rest.substr(0, rest.size() - before.size)).code] & kUpper;
      return two_upper ? 1 : 0;
    }
    if (digit && (c.code == '+' || c.code == '%' || c.code == '$' || within(kFrontOnly, c.code))) return c.size;
    return unit(chunk);
  }

  // "5km": a unit after a digit.
  static size_t unit(std::string_view chunk) {
    static const std::unordered_set<std::string_view> kUnits = {
        "km", "m",  "dm", "cm", "mm",  "ha",   "nm",  "yd",  "in", "ft",   "kg", "g",
        "mg", "t",  "lb", "oz", "m/s", "km/h", "mph", "hPa", "Pa", "mbar", "mb", "MB",
        "kb", "KB", "gb", "GB", "tb",  "TB",   "T",   "G",   "M",  "K",    "am", "pm"};
    size_t size = 0;
    while (size < chunk.size() && size < 5 && !is_digit(chunk[chunk.size() - size - 1])) ++size;
    if (size == 0 || size == chunk.size() || !is_digit(chunk[chunk.size() - size - 1])) return 0;
    return kUnits.contains(chunk.substr(chunk.size() - size)) ? size : 0;
  }

  // What is between letters parts them, unless it is an address.
  void split_inside(std::string_view chunk) {
    if (chunk.find("://") != chunk.npos || chunk.starts_with("www.") || chunk.find('@') != chunk.npos)
      return add(chunk);
    size_t begin = 0;
    for (size_t i = 1; i + 1 < chunk.size();) {
      const auto byte = static_cast<unsigned char>(chunk[i]);
      const bool may_part = byte >= 0x80 || !((byte | 32) >= 'a' && (byte | 32) <= 'z');
      const size_t size = may_part ? infix(chunk, i) : 0;
      if (size > 0) {
        if (i > begin) add(chunk.substr(begin, i - begin));
        add(chunk.substr(i, size));
        begin = i + size;
        i = begin;
      }
      i += size == 0;
    }
    if (begin < chunk.size()) add(chunk.substr(begin));
  }

  static size_t infix(std::string_view chunk, size_t at) {
    if (const size_t dots = dots_at(chunk, at)) return dots;
    const CodePoint c = first_char(chunk.substr(at));
    if (c.code == 0xFFFD) return 0;
    const uint8_t edges = edges_of(c.code);
    if (c.code == 0x2026 || within(kPictures, c.code)) return c.size;
    const bool parts = edges & kHyphen || c.code == ':' || c.code == '<' || c.code == '>' || c.code == '=' ||
                       c.code == '/' || c.code == ',' || c.code == '.' || c.code == '+' || c.code == '*' ||
                       c.code == '^';
    if (!parts || at + c.size >= chunk.size()) return 0;
    size_t size = c.size;
    while (c.code == '-' && at + size < chunk.size() && chunk[at + size] == '-' && size < 3) ++size;
    if (at + size >= chunk.size()) return 0;
    const CodePoint before = last_char(chunk.substr(0, at)), after = first_char(chunk.substr(at + size));
    const bool letter_before = is_letter(before.code), letter_after = is_letter(after.code);
    const bool digit_before = before.code >= '0' && before.code <= '9';
    const bool digit_after = after.code >= '0' && after.code <= '9';
    if (c.code == '.') return (kClassOf[before.code] & kLower) && (kClassOf[after.code] & kUpper) ? size : 0;
    if (c.code == ',') return letter_before && letter_after ? size : 0;
    if (digit_before && (digit_after || after.code == '-') &&
        (c.code == '+' || c.code == '-' || c.code == '*' || c.code == '^'))
      return c.size;
    if (c.code == '+' || c.code == '*' || c.code == '^') return 0;
    return (letter_before || digit_before) && letter_after ? size : 0;
  }

  void add(std::string_view text) {
    Word word{text, 0, false, true};
    for (size_t i = 0; i < text.size(); ++word.chars) {
      const CodePoint c = first_char(text.substr(i));
      i += c.size;
      word.has_letter |= is_letter(c.code);
      word.is_symbol = word.is_symbol && edges_of(c.code) & kSymbol;
    }
    words_.push_back(word);
  }

  std::vector<Word>& words_;
  std::vector<std::string_view> suffixes_;
};

}  // namespace

void split_words(std::string_view utf8, std::vector<Word>& words) {
  words.clear();
  Splitter splitter(words);
  const auto* p = reinterpret_cast<const uint8_t*>(utf8.data());
  const auto* end = p + utf8.size();
  while (p < end) {
    const Char first = char_at(p, end);
    if (first.cls & kSpace) {
      p += first.size;
      continue;
    }
    const uint8_t* begin = p;
    while (p < end && kAsciiLetter[*p]) ++p;
    const uint8_t* letters_end = p;
    for (Char c; p < end && !((c = char_at(p, end)).cls & kSpace);) p += c.size;
    const std::string_view chunk(reinterpret_cast<const char*>(begin), static_cast<size_t>(p - begin));
    const size_t letters = static_cast<size_t>(letters_end - begin);
    // Most words: letters alone, or with a mark after them.
    if (letters == chunk.size() && (letters < 3 || !may_contract(chunk))) {
      words.push_back({chunk, static_cast<uint32_t>(letters), true, false});
    } else if (letters + 1 == chunk.size() && letters >= 3 && is_plain_mark(chunk.back()) &&
               !may_contract(chunk.substr(0, letters))) {
      words.push_back({chunk.substr(0, letters), static_cast<uint32_t>(letters), true, false});
      words.push_back({chunk.substr(letters), 1, false, true});
    } else {
      splitter.split(chunk);
    }
  }
}

bool ends_sentence(uint32_t code) {
  return code < 0x80 ? code == '.' || code == '!' || code == '?' : within(kSentenceEnds, code);
}

size_t count_sentences(const std::vector<Word>& words) {
  size_t sentences = !words.empty();
  bool ended = false;
  for (const Word& word : words) {
    const bool end = word.chars == 1 && ends_sentence(first_char(word.text).code);
    if (ended && !end && !word.is_symbol) {
      ++sentences;
      ended = false;
    } else if (end) {
      ended = true;
    }
  }
  return sentences;
}

}  // namespace cs336::text
