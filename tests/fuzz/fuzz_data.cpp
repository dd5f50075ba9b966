// Coverage-guided fuzzing of what pages and documents go through: text of pages, counts of rules, lines, n-grams.
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Icsrc tests/fuzz/fuzz_data.cpp csrc/cpu/text/*.cpp
//   ./a.out -max_len=4096 -max_total_time=600
// gcc has no fuzzer: g++ -DSEEDS -fsanitize=address,undefined ... makes a program that changes files that it is given.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cpu/text/content.h"
#include "cpu/text/features.h"
#include "cpu/text/html_render.h"
#include "cpu/text/lines.h"
#include "cpu/text/ngram_index.h"
#include "cpu/text/ngram_model.h"
#include "cpu/text/phrases.h"
#include "cpu/text/rules.h"
#include "cpu/text/shingles.h"

using namespace cs336::text;

namespace {

void require(bool truth, const char* what) {
  if (truth) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

void read_page(std::string_view html) {
  const Page page = parse_html(html);
  for (const bool markdown : {false, true}) {
    const std::string all = render(page, visible_blocks(page), markdown);
    require(render(page, main_content(page), markdown).size() <= all.size(), "the main content is a part of the page");
  }
}

void count(std::string_view text) {
  const QualityCounts quality = gopher_quality_counts(text);
  require(quality.letter_words <= quality.words, "words with a letter are words");
  gopher_repetition_counts(text);
  require(fineweb_counts(text).newlines <= text.size(), "newlines are characters");
  std::string kept;
  c4_counts(text, kept);
}

void compare(std::string_view text, size_t n) {
  const std::vector<uint64_t> words = shingles(text, n, Unit::kWord), chars = shingles(text, n, Unit::kChar);
  require(jaccard(words, words) == 1 || words.empty(), "a text is like itself");
  require(jaccard(words, chars) <= 1, "no texts are more than alike");
  NgramIndex index(n);
  require((index.add(text, 0) > 0) == index.find(text).has_value(), "a text holds its own n-grams");
  for (const Unit unit : {Unit::kWord, Unit::kChar}) {
    NgramModel model(n, unit);
    model.add(text);
    require(std::isfinite(model.score(text).log_probability), "a text that was counted has a probability");
  }
  std::vector<uint32_t> buckets;
  FeatureExtractor({static_cast<uint32_t>(n), 1, 3, 8}).extract(text, buckets);
  for (const uint32_t bucket : buckets) require(bucket < 256, "features are in their buckets");
}

void drop_lines(std::string_view text) {
  std::vector<uint8_t> drop(count_lines(text));
  LineDedup dedup(0, 1, 1);
  dedup.count(text);
  std::string kept;
  const auto report = dedup.drop_repeated(text, true, drop.data(), [&](std::string_view part) { kept += part; });
  require(report.lines == drop.size() && kept.size() <= text.size(), "what is kept is a part of the text");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);  // of its own size: no byte is beside it
  read_page(text);
  count(text);
  compare(text, 1 + data[0] % 5);
  drop_lines(text);
  const std::string phrases[] = {text.substr(0, 3), text.substr(text.size() / 2, 5)};
  if (!phrases[0].empty() && !phrases[1].empty()) Phrases(phrases, data[0] % 2 == 0).find(text, 2);
  return 0;
}

#ifdef SEEDS
#include <fstream>
#include <iterator>
#include <random>

// a.out COUNT FILE...: each file, changed at random, so often.
int main(int argc, char** argv) {
  std::mt19937 random(0);
  for (int file = 2; file < argc; ++file) {
    std::ifstream stream(argv[file], std::ios::binary);
    const std::string seed{std::istreambuf_iterator<char>(stream), {}};
    for (int i = std::atoi(argv[1]); i > 0; --i) {
      std::string text = seed;
      for (int changes = static_cast<int>(random() % 8); changes > 0 && !text.empty(); --changes) {
        const size_t at = random() % text.size(), from = random() % seed.size();
        if (random() % 3 == 0) text[at] = static_cast<char>(random());
        if (random() % 3 == 0) text.insert(at, seed, from, random() % 40);
        if (random() % 3 == 0) text.erase(at, random() % 40);
      }
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(text.data()), text.size());
    }
  }
}
#endif
