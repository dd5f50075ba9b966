// Which blocks of a page are its main content. Two small networks, one hidden layer each, score every block:
//
//   first[b] = net(features[b]),   second[b] = net(features[b], context of b in the first scores of the page)
//
// and a block whose second score is positive is kept. The weights are those of content_weights.h, which
// make_content_weights.py learns from pages with gold text.
#pragma once
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cpu/text/html.h"

namespace cs336::text {

// The text of a block: runs joined, white space at line ends and between runs made one.
std::string block_text(const Page& page, const Block& block);

// Row b is of block b.
struct Features {
  size_t width = 0;
  std::vector<float> values;
  std::span<const float> row(size_t block) const { return {values.data() + block * width, width}; }
};

// What words in class and id names say of an element: positive for content.
using HintWeights = std::unordered_map<std::string, float>;
const HintWeights& trained_hints();

// Lower-case words of the class and id of an element.
std::vector<std::string> hint_words(const Element& element);

Features block_features(const Page& page, const HintWeights& hints);
// scores: the first, one a block.
Features context_features(const Page& page, std::span<const float> scores);

// Which blocks to keep: those that are shown, and of them the main content.
std::vector<bool> visible_blocks(const Page& page);
std::vector<bool> main_content(const Page& page);

}  // namespace cs336::text
