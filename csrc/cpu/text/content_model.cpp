// The trained part of content.h.
#include <algorithm>
#include <array>

#include "cpu/text/content.h"
#include "cpu/text/content_weights.h"
#include "cpu/text/widest.h"

namespace cs336::text {
namespace {

constexpr size_t kShortPage = 1000;  // bytes of text
constexpr float kClip = 4;           // standard deviations: what is further out says no more

// hidden += standardised features times weights (F, H), which begin at feature `first`.
CS336_WIDEST void add_features(const ContentNet& net, size_t first, const float* values, size_t count, float* hidden) {
  float sums[kContentHidden];
  std::copy_n(hidden, kContentHidden, sums);
  for (size_t i = 0; i < count; ++i) {
    const float x = (values[i] - net.mean[first + i]) * net.inverse_std[first + i];
    const float clipped = std::min(std::max(x, -kClip), kClip);
    const float* weights = net.hidden + (first + i) * kContentHidden;
    for (size_t h = 0; h < kContentHidden; ++h) sums[h] += clipped * weights[h];
  }
  std::copy_n(sums, kContentHidden, hidden);
}

// parts: the rows of a block, one after the other.
float run_net(const ContentNet& net, std::initializer_list<std::span<const float>> parts) {
  std::array<float, kContentHidden> hidden;
  std::copy_n(net.hidden_bias, kContentHidden, hidden.begin());
  size_t first = 0;
  for (const std::span<const float> part : parts) {
    add_features(net, first, part.data(), part.size(), hidden.data());
    first += part.size();
  }
  float score = net.bias;
  for (size_t h = 0; h < kContentHidden; ++h) score += std::max(hidden[h], 0.0f) * net.out[h];
  return score;
}

bool is_short(const Page& page) {
  size_t size = 0;
  for (const Run& run : page.runs) size += run.text.size();
  return size < kShortPage;
}

}  // namespace

const HintWeights& trained_hints() {
  static const HintWeights kWeights = [] {
    HintWeights weights;
    for (const auto& [word, weight] : kHintWeights) weights.emplace(word, weight);
    return weights;
  }();
  return kWeights;
}

std::vector<bool> visible_blocks(const Page& page) {
  std::vector<bool> keep;
  for (const Block& block : page.blocks) keep.push_back(!page.elements[block.element].hidden);
  return keep;
}

std::vector<bool> main_content(const Page& page) {
  const Features features = block_features(page, trained_hints());
  std::vector<float> first;
  for (size_t b = 0; b < page.blocks.size(); ++b) first.push_back(run_net(kFirstNet, {features.row(b)}));
  const Features context = context_features(page, first);
  std::vector<bool> keep;
  for (size_t b = 0; b < page.blocks.size(); ++b) {
    keep.push_back(run_net(kSecondNet, {features.row(b), context.row(b)}) > 0);
  }
  // A short page has no surroundings that its content could be told from: what it shows, rather than nothing.
  if (std::find(keep.begin(), keep.end(), true) == keep.end() && is_short(page)) return visible_blocks(page);
  return keep;
}

}  // namespace cs336::text
