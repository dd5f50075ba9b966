// The trained part of content.h.
#include <algorithm>
#include <array>

#include "cpu/text/content.h"
#include "cpu/text/content_weights.h"

namespace cs336::text {
namespace {

constexpr float kClip = 4;  // standard deviations: what is further out says no more

// inputs: the rows `parts` of a block, one after the other.
float run_net(const ContentNet& net, std::initializer_list<std::span<const float>> parts) {
  std::array<float, kContentHidden> hidden;
  std::copy(net.hidden_bias, net.hidden_bias + kContentHidden, hidden.begin());
  size_t i = 0;
  for (const std::span<const float> part : parts) {
    for (const float value : part) {
      const float x = std::clamp((value - net.mean[i]) * net.inverse_std[i], -kClip, kClip);
      const float* weights = net.hidden + i * kContentHidden;
      for (size_t h = 0; h < kContentHidden; ++h) hidden[h] += x * weights[h];
      ++i;
    }
  }
  float score = net.bias;
  for (size_t h = 0; h < kContentHidden; ++h) score += std::max(hidden[h], 0.0f) * net.out[h];
  return score;
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

std::vector<bool> main_content(const Page& page) {
  const Features features = block_features(page, trained_hints());
  std::vector<float> first;
  for (size_t b = 0; b < page.blocks.size(); ++b) first.push_back(run_net(kFirstNet, {features.row(b)}));
  const Features context = context_features(page, first);
  std::vector<bool> keep;
  for (size_t b = 0; b < page.blocks.size(); ++b) {
    keep.push_back(run_net(kSecondNet, {features.row(b), context.row(b)}) > 0);
  }
  return keep;
}

}  // namespace cs336::text
