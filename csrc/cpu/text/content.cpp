#include "cpu/text/content.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <unordered_map>
#include <unordered_set>

namespace cs336::text {
namespace {

constexpr bool is_word(unsigned char c) {
  return c >= 0x80 || (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z');
}
constexpr bool is_upper(unsigned char c) { return c >= 'A' && c <= 'Z'; }

// What a block says by itself.
struct BlockCounts {
  float words = 0, link_words = 0, letters = 0, commas = 0, stops = 0, digits = 0, capitals = 0, stop_words = 0,
        bold_words = 0, breaks = 0;
  bool ends_sentence = false, starts_lower = false;
};

// The most frequent words of running text in nine languages.
constexpr std::string_view kStopWords[] = {
    "the",  "and",  "of",   "to",   "in",    "a",    "is",    "that",  "it",  "was",  "for",   "on",  "are",   "as",
    "with", "his",  "they", "at",   "be",    "this", "from",  "have",  "or",  "had",  "by",    "not", "but",   "what",
    "were", "we",   "when", "can",  "there", "an",   "which", "their", "if",  "will", "about", "how", "up",    "he",
    "she",  "i",    "you",  "has",  "been",  "who",  "would", "der",   "die", "das",  "und",   "ist", "nicht", "ein",
    "eine", "zu",   "den",  "mit",  "von",   "auf",  "le",    "la",    "les", "des",  "et",    "est", "une",   "que",
    "dans", "pour", "el",   "los",  "las",   "y",    "en",    "por",   "con", "para", "una",   "del", "il",    "di",
    "che",  "per",  "non",  "sono", "o",     "os",   "da",    "do",    "um",  "uma",  "het",   "een", "van",   "dat"};

// Words of up to six bytes as numbers, in an open table.
class StopWords {
 public:
  StopWords() {
    for (const std::string_view word : kStopWords) {
      uint64_t key = 0;
      for (const char c : word) key = key << 8 | static_cast<uint8_t>(c);
      size_t at = place(key);
      while (table_[at] != 0) at = (at + 1) % kSize;
      table_[at] = key;
    }
  }
  bool contains(uint64_t key) const {
    for (size_t at = place(key); table_[at] != 0; at = (at + 1) % kSize) {
      if (table_[at] == key) return true;
    }
    return false;
  }

 private:
  static constexpr size_t kSize = 1024;
  static size_t place(uint64_t key) { return (key * 0x9E3779B97F4A7C15u) >> 54; }
  std::array<uint64_t, kSize> table_{};
};
const StopWords kStops;

void count_run(const Run& run, BlockCounts& counts) {
  std::string_view text = run.text;
  for (size_t i = 0; i < text.size();) {
    const auto c = static_cast<unsigned char>(text[i]);
    if (!is_word(c)) {
      counts.commas += c == ',' || c == ';';
      counts.stops += c == '.' || c == '!' || c == '?';
      counts.breaks += c == '\n';
      if (c != ' ' && c != '\n') counts.ends_sentence = c == '.' || c == '!' || c == '?' || c == '"' || c == ':';
      ++i;
      continue;
    }
    const size_t begin = i;
    bool digits = true, wide = true;
    for (; i < text.size() && (is_word(static_cast<unsigned char>(text[i])) || text[i] == '\''); ++i) {
      digits &= text[i] >= '0' && text[i] <= '9';
      wide &= static_cast<unsigned char>(text[i]) >= 0x80;
    }
    const std::string_view word = text.substr(begin, i - begin);
    // Chinese and Japanese do not part words: two characters count as one.
    const float words = wide && word.size() > 12 ? static_cast<float>(word.size()) / 6 : 1;
    if (counts.words == 0) counts.starts_lower = c >= 'a' && c <= 'z';
    counts.words += words;
    if (run.link != kNone) counts.link_words += words;
    if (run.style & kBold) counts.bold_words += words;
    counts.letters += static_cast<float>(word.size());
    counts.digits += digits;
    counts.capitals += is_upper(c);
    if (word.size() <= 6) {
      uint64_t key = 0;
      for (const char x : word) key = key << 8 | static_cast<uint8_t>(is_upper(x) ? x | 32 : x);
      counts.stop_words += kStops.contains(key);
    }
    counts.ends_sentence = false;
  }
}

struct SubtreeCounts {
  float words = 0, link_words = 0, blocks = 0, long_words = 0, paragraphs = 0, commas = 0;
  void add(const SubtreeCounts& other) {
    words += other.words;
    link_words += other.link_words;
    blocks += other.blocks;
    long_words += other.long_words;
    paragraphs += other.paragraphs;
    commas += other.commas;
  }
};

float ratio(float part, float whole) { return whole > 0 ? part / whole : 0; }
// log(1 + x) of counts, which are whole but for those of Chinese and Japanese words.
float log1(float x) {
  static const std::vector<float> kTable = [] {
    std::vector<float> table;
    for (int i = 0; i < 1024; ++i) table.push_back(std::log1p(static_cast<float>(i)));
    return table;
  }();
  return x < 1024 ? kTable[static_cast<size_t>(x)] : std::log1p(x);
}

uint64_t word_hash(std::string_view word) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const char c : word) hash = (hash ^ static_cast<uint8_t>(is_upper(c) ? c | 32 : c)) * 0x100000001B3u;
  return hash;
}

template <class Visit>
void for_each_word(std::string_view text, Visit&& visit) {
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    while (i < text.size() && is_word(static_cast<unsigned char>(text[i]))) ++i;
    if (i > begin) visit(word_hash(text.substr(begin, i - begin)));
    i += i == begin;
  }
}

float share_of_title(const Page& page, const Block& block, const std::unordered_set<uint64_t>& title) {
  float words = 0, common = 0;
  if (title.empty()) return 0;
  for (uint32_t r = block.first_run; r < block.end_run; ++r) {
    for_each_word(page.runs[r].text, [&](uint64_t word) {
      ++words;
      common += title.contains(word);
    });
  }
  return ratio(common, words);
}

// What class and id names say of an element.
float hint_score(const Element& element, const HintWeights& weights) {
  float score = 0;
  for (const std::string& word : hint_words(element)) {
    const auto found = weights.find(word);
    if (found != weights.end()) score += found->second;
  }
  return std::clamp(score, -3.0f, 3.0f);
}

constexpr std::array kLeaves = {Tag::kP,  Tag::kDiv, Tag::kLi, Tag::kTd,         Tag::kTh,         Tag::kDd,
                                Tag::kDt, Tag::kPre, Tag::kH1, Tag::kBlockquote, Tag::kFigcaption, Tag::kSection};
constexpr std::array kAround = {Tag::kArticle, Tag::kMain,  Tag::kAside,   Tag::kNav, Tag::kHeader,     Tag::kFooter,
                                Tag::kForm,    Tag::kTable, Tag::kUl,      Tag::kOl,  Tag::kBlockquote, Tag::kFigure,
                                Tag::kSection, Tag::kDl,    Tag::kAddress, Tag::kLi};
constexpr size_t kLevels = 4;      // ancestors whose counts are features
constexpr size_t kNeighbours = 3;  // blocks on each side

// Words, and how many of them the first scores keep.
struct Kept {
  float words = 0, kept = 0;
  void add(const Kept& other) {
    words += other.words;
    kept += other.kept;
  }
};

Kept kept_words(const Page& page, const Block& block, float score) {
  BlockCounts counts;
  for (uint32_t r = block.first_run; r < block.end_run; ++r) count_run(page.runs[r], counts);
  const float words = std::max(counts.words, 1.0f);
  return {words, words / (1 + std::exp(-score))};
}

class Extractor {
 public:
  Extractor(const Page& page, const HintWeights& hints)
      : page_(page), blocks_(page.blocks.size()), subtrees_(page.elements.size()), candidates_(page.elements.size()) {
    for (size_t b = 0; b < blocks_.size(); ++b) {
      const Block& block = page.blocks[b];
      for (uint32_t r = block.first_run; r < block.end_run; ++r) count_run(page.runs[r], blocks_[b]);
      const BlockCounts& c = blocks_[b];
      const float long_words = c.words >= 10 && ratio(c.link_words, c.words) < 0.33f ? c.words : 0;
      subtrees_[block.element].add(
          {c.words, c.link_words, 1, long_words, static_cast<float>(long_words > 0), c.commas});
      vote(page.elements[block.element].tag == Tag::kP ? page.elements[block.element].parent : block.element, c);
    }
    for (size_t e = subtrees_.size(); e-- > 1;) subtrees_[page.elements[e].parent].add(subtrees_[e]);
    score_hints(hints);
    choose_candidate();
    describe_page();
  }

  Features all() {
    Features features;
    std::unordered_set<uint64_t> title;
    for_each_word(page_.title, [&](uint64_t word) { title.insert(word); });
    float before = 0, since_heading = 0, since_h1 = -1;
    for (size_t b = 0; b < blocks_.size(); ++b) {
      row_.clear();
      const Element& leaf = page_.elements[page_.blocks[b].element];
      const bool heading = leaf.kind & kIsHeading;
      if (heading) since_heading = 0;
      if (leaf.tag == Tag::kH1) since_h1 = 0;
      add_own(b);
      add_tags(b);
      const SubtreeCounts& whole = subtrees_[0];
      const bool may_be_title = blocks_[b].words <= 30;
      add({ratio(before, whole.words), ratio(static_cast<float>(b), static_cast<float>(blocks_.size())),
           log1(whole.words), log1(whole.blocks), ratio(whole.link_words, whole.words),
           ratio(whole.long_words, whole.words), log1(since_heading), since_h1 < 0 ? -1 : log1(since_h1),
           may_be_title ? share_of_title(page_, page_.blocks[b], title) : 0});
      row_.insert(row_.end(), style_.begin(), style_.end());
      add_candidate(b);
      add_ancestors(b);
      add_neighbours(b);
      before += blocks_[b].words;
      since_heading += blocks_[b].words;
      if (since_h1 >= 0) since_h1 += blocks_[b].words;
      features.width = row_.size();
      features.values.insert(features.values.end(), row_.begin(), row_.end());
    }
    return features;
  }

 private:
  void add(std::initializer_list<float> values) { row_.insert(row_.end(), values); }

  // As readability has it: a paragraph speaks for its parent, half for the parent of that, and less and less further
  // up.
  void vote(uint32_t element, const BlockCounts& c) {
    if (c.words < 5) return;
    const float gain = 1 + c.commas + std::min(c.words / 18, 3.0f);
    for (uint32_t level = 0; element != kNone && level < 5; ++level, element = page_.elements[element].parent) {
      candidates_[element] += gain / static_cast<float>(level == 0 ? 1 : level == 1 ? 2 : 3 * level);
    }
  }

  void choose_candidate() {
    for (size_t e = 0; e < candidates_.size(); ++e) {
      if (candidates_[e] == 0) continue;
      candidates_[e] = std::max(candidates_[e] + 8 * hints_[e], 0.0f);
      candidates_[e] *= 1 - ratio(subtrees_[e].link_words, subtrees_[e].words);
      if (candidates_[e] <= best_) continue;
      best_ = candidates_[e];
      best_element_ = static_cast<uint32_t>(e);
    }
  }

  // Whether a block is in the best candidate, the parent of that, the parent of that.
  void add_candidate(size_t b) {
    std::array<float, 3> inside{};
    std::array<uint32_t, 3> of{best_element_, best_element_, best_element_};
    for (size_t i = 1; i < of.size(); ++i) {
      of[i] = page_.elements[of[i - 1]].parent == kNone ? of[i - 1] : page_.elements[of[i - 1]].parent;
    }
    float distance = 0, steps = 0;
    for (uint32_t e = page_.blocks[b].element; e != kNone; e = page_.elements[e].parent, ++steps) {
      for (size_t i = 0; i < of.size(); ++i) inside[i] = std::max(inside[i], static_cast<float>(e == of[i]));
      if (e == best_element_) distance = steps;
    }
    row_.insert(row_.end(), inside.begin(), inside.end());
    add({distance, ratio(subtrees_[of[0]].long_words, subtrees_[0].long_words),
         ratio(subtrees_[of[2]].long_words, subtrees_[0].long_words)});
  }

  // Old pages are laid out by tables and name nothing; what is content there differs.
  void describe_page() {
    float classes = 0, ids = 0, divs = 0, cells = 0, paragraphs = 0, links = 0, articles = 0;
    for (const Element& element : page_.elements) {
      classes += !element.classes.empty();
      ids += !element.id.empty();
      divs += element.tag == Tag::kDiv;
      cells += element.tag == Tag::kTd;
      paragraphs += element.tag == Tag::kP;
      links += element.tag == Tag::kA;
      articles += element.tag == Tag::kArticle;
    }
    const auto all = static_cast<float>(page_.elements.size());
    const auto blocks = static_cast<float>(blocks_.size());
    style_ = {log1(all),        classes / all,  ids / all,
              divs / all,       cells / all,    links / all,
              log1(paragraphs), log1(articles), subtrees_[0].paragraphs / blocks,
              log1(best_)};
  }

  void score_hints(const HintWeights& weights) {
    for (const Element& element : page_.elements) {
      hints_.push_back(element.classes.empty() && element.id.empty() ? 0 : hint_score(element, weights));
      if (element.parent == kNone) {
        all_hints_.push_back(hints_.back());
        least_hints_.push_back(hints_.back());
        most_hints_.push_back(hints_.back());
        continue;
      }
      all_hints_.push_back(all_hints_[element.parent] + hints_.back());
      least_hints_.push_back(std::min(least_hints_[element.parent], hints_.back()));
      most_hints_.push_back(std::max(most_hints_[element.parent], hints_.back()));
    }
  }

  void add_own(size_t b) {
    const BlockCounts& c = blocks_[b];
    const float runs = static_cast<float>(page_.blocks[b].end_run - page_.blocks[b].first_run);
    add({log1(c.words), ratio(c.link_words, c.words), ratio(c.letters, c.words), ratio(c.commas, c.words),
         log1(c.stops), ratio(c.digits, c.words), ratio(c.capitals, c.words), ratio(c.stop_words, c.words),
         ratio(c.bold_words, c.words), log1(c.breaks), log1(runs), static_cast<float>(c.ends_sentence),
         static_cast<float>(c.starts_lower)});
  }

  void add_tags(size_t b) {
    const uint32_t leaf = page_.blocks[b].element;
    const Element& element = page_.elements[leaf];
    for (const Tag tag : kLeaves) row_.push_back(element.tag == tag);
    add({static_cast<float>((element.kind & kIsHeading) && element.tag != Tag::kH1), static_cast<float>(element.hidden),
         static_cast<float>(element.depth)});
    uint64_t seen = 0;
    float lists = 0, tables = 0;
    for (uint32_t e = leaf; e != kNone; e = page_.elements[e].parent) {
      const Tag tag = page_.elements[e].tag;
      seen |= uint64_t{1} << static_cast<int>(tag);
      lists += tag == Tag::kUl || tag == Tag::kOl;
      tables += tag == Tag::kTable;
    }
    for (const Tag tag : kAround) row_.push_back(static_cast<float>(seen >> static_cast<int>(tag) & 1));
    const uint32_t parent = element.parent == kNone ? leaf : element.parent;
    add({lists, tables, hints_[leaf], hints_[parent], all_hints_[leaf], least_hints_[leaf], most_hints_[leaf]});
  }

  void add_ancestors(size_t b) {
    const SubtreeCounts& whole = subtrees_[0];
    uint32_t e = page_.blocks[b].element;
    for (size_t level = 0; level < kLevels; ++level) {
      const SubtreeCounts& s = subtrees_[e];
      add({log1(s.words), ratio(s.link_words, s.words), log1(s.blocks), ratio(s.words, whole.words),
           ratio(s.long_words, whole.long_words), ratio(s.long_words, s.words), log1(s.paragraphs),
           ratio(candidates_[e], best_)});
      if (page_.elements[e].parent != kNone) e = page_.elements[e].parent;
    }
    float best = 0;
    for (e = page_.blocks[b].element; e != kNone; e = page_.elements[e].parent) best = std::max(best, candidates_[e]);
    row_.push_back(ratio(best, best_));
  }

  void add_neighbours(size_t b) {
    const uint32_t parent = page_.elements[page_.blocks[b].element].parent;
    const auto add_one = [&](size_t other, bool exists) {
      if (!exists) return add({0, 0, 0, 0, 0, 0, 0});
      const BlockCounts& c = blocks_[other];
      const Element& leaf = page_.elements[page_.blocks[other].element];
      add({log1(c.words), ratio(c.link_words, c.words), log1(c.stops), ratio(c.stop_words, c.words),
           static_cast<float>(leaf.tag == Tag::kP), static_cast<float>((leaf.kind & kIsHeading) != 0),
           static_cast<float>(leaf.parent == parent)});
    };
    for (size_t i = 1; i <= kNeighbours; ++i) {
      add_one(b - i, b >= i);
      add_one(b + i, b + i < blocks_.size());
    }
  }

  const Page& page_;
  std::vector<BlockCounts> blocks_;
  std::vector<SubtreeCounts> subtrees_;
  std::vector<float> candidates_, hints_, all_hints_, least_hints_, most_hints_, style_, row_;
  float best_ = 0;
  uint32_t best_element_ = 0;
};

}  // namespace

std::string block_text(const Page& page, const Block& block) {
  std::string text;
  for (uint32_t r = block.first_run; r < block.end_run; ++r) {
    const Run& run = page.runs[r];
    if (run.style & kPreformatted) {
      text += run.text;
      continue;
    }
    for (const char c : run.text) {
      const bool space = c == ' ' || c == '\n';
      if (space && text.empty()) continue;
      if (c == '\n') {
        while (!text.empty() && text.back() == ' ') text.pop_back();
      }
      if (space && (text.back() == '\n' || (c == ' ' && text.back() == ' '))) continue;
      text += c;
    }
  }
  while (!text.empty() && (text.back() == ' ' || text.back() == '\n')) text.pop_back();
  return text;
}

Features block_features(const Page& page, const HintWeights& hints) { return Extractor(page, hints).all(); }

Features context_features(const Page& page, std::span<const float> scores) {
  constexpr std::array<size_t, 3> kWindows = {3, 8, 20};
  const size_t count = page.blocks.size();
  std::vector<Kept> of(page.elements.size()), before(count + 1);
  float best = -10;
  for (size_t b = 0; b < count; ++b) {
    const Kept kept = kept_words(page, page.blocks[b], scores[b]);
    of[page.blocks[b].element].add(kept);
    before[b + 1] = before[b];
    before[b + 1].add(kept);
    best = std::max(best, scores[b]);
  }
  for (size_t e = of.size(); e-- > 1;) of[page.elements[e].parent].add(of[e]);
  const Kept whole = before[count];
  Features features;
  for (size_t b = 0; b < count; ++b) {
    const size_t begin = features.values.size();
    const auto add = [&](float value) { features.values.push_back(value); };
    add(scores[b]);
    for (size_t i = 1; i <= kNeighbours; ++i) {
      add(b >= i ? scores[b - i] : -5);
      add(b + i < count ? scores[b + i] : -5);
    }
    for (const size_t reach : kWindows) {
      const Kept &low = before[b - std::min(b, reach)], &high = before[std::min(b + reach + 1, count)];
      add(ratio(high.kept - low.kept, high.words - low.words));
    }
    uint32_t e = page.blocks[b].element;
    for (size_t level = 0; level < kLevels; ++level) {
      add(ratio(of[e].kept, of[e].words));
      add(ratio(of[e].kept, whole.kept));
      if (page.elements[e].parent != kNone) e = page.elements[e].parent;
    }
    add(ratio(before[b].kept, whole.kept));
    add(ratio(whole.kept - before[b + 1].kept, whole.kept));
    add(ratio(whole.kept, whole.words));
    add(log1(whole.kept));
    add(best);
    features.width = features.values.size() - begin;
  }
  return features;
}

std::vector<std::string> hint_words(const Element& element) {
  std::vector<std::string> words;
  for (const std::string_view names : {element.classes, element.id}) {
    std::string word;
    for (size_t i = 0; i <= names.size(); ++i) {
      const char c = i < names.size() ? names[i] : ' ';
      const bool letter = (c | 32) >= 'a' && (c | 32) <= 'z';
      const bool camel = is_upper(c) && i > 0 && names[i - 1] >= 'a' && names[i - 1] <= 'z';
      if ((!letter || camel) && word.size() > 1) words.push_back(word);
      if (!letter || camel) word.clear();
      if (letter && word.size() < 32) word += static_cast<char>(c | 32);
    }
  }
  return words;
}

}  // namespace cs336::text
