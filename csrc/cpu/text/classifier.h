// A linear softmax over hashed features (features.h), trained by stochastic gradient descent
// whose step shrinks to nothing. AdaGrad's steps a feature and the mean instead of 1 / sqrt(n) were measured: both
// lose.
//
//   logits_k = bias_k + sum_f w[f][k] / sqrt(n)      over the n different features f of a text
#pragma once
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "cpu/text/features.h"
#include "cpu/text/huge_pages.h"

namespace cs336::text {

class Classifier {
 public:
  static constexpr size_t kBlock = 32;  // weights that share a scale where they are int8

  // weights: (2^bucket_bits, num_classes).
  Classifier(const FeatureSpec& spec, std::span<const float> bias, std::span<const float> weights);
  // The same, weight i being int8s[i] * scales[i / kBlock].
  Classifier(const FeatureSpec& spec, std::span<const float> bias, std::span<const int8_t> int8s,
             std::span<const float> scales);

  size_t num_classes() const { return bias_.size(); }

  // Reusable memory of one thread.
  struct Scratch {
    explicit Scratch(const Classifier& model) : extractor(model.spec_) {}
    FeatureExtractor extractor;
    std::vector<uint32_t> features;
  };
  // (num_classes,) probabilities.
  void predict(std::string_view utf8, Scratch& scratch, float* probabilities) const;

 private:
  FeatureSpec spec_;
  std::vector<float> bias_;
  TableVector<float> weights_;  // or
  TableVector<int8_t> int8s_;
  std::vector<float> scales_;
};

struct TrainOptions {
  size_t num_classes, epochs, num_threads;
  float learning_rate;
  uint64_t seed;
};

// Keeps the features of texts (4 bytes each), not the texts.
class ClassifierTrainer {
 public:
  explicit ClassifierTrainer(const FeatureSpec& spec) : spec_(spec) {}

  // labels: (texts.size(),).
  void add(std::span<const std::string_view> texts, std::span<const uint32_t> labels, size_t num_threads);
  // Passes over all texts, in a new order each. With one thread the result is a function of the texts and the options;
  // several write to the same weights without waiting (Hogwild), and it varies a little.
  // Throws std::invalid_argument for a label that is not below num_classes.
  void fit(const TrainOptions& options);

  std::span<const float> bias() const { return bias_; }        // (num_classes,)
  std::span<const float> weights() const { return weights_; }  // (2^bucket_bits, num_classes)

 private:
  template <size_t kClasses>
  void learn(size_t example, float rate);

  FeatureSpec spec_;
  size_t num_classes_ = 0;
  TableVector<float> weights_;
  std::vector<float> bias_;
  std::vector<size_t> ends_ = {0};  // where the features of each text end
  std::vector<uint32_t> features_, labels_;
};

}  // namespace cs336::text
