#include "cpu/text/classifier.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cpu/text/hash.h"
#include "cpu/text/interrupt.h"
#include "cpu/text/parallel.h"

namespace cs336::text {
namespace {

constexpr size_t kAhead = 16;     // features whose weights are on their way while one is read
constexpr size_t kNextText = 64;  // of the next text, whose weights are fetched during this one
constexpr size_t kGroup = 64;     // texts that a thread takes at a time

void softmax(float* logits, size_t count) {
  const float most = *std::max_element(logits, logits + count);
  float sum = 0;
  for (size_t k = 0; k < count; ++k) sum += logits[k] = std::exp(logits[k] - most);
  for (size_t k = 0; k < count; ++k) logits[k] /= sum;
}

// Threads may read and write one weight at a time: either's value will do, but no mixture of the two.
float read(float& place) { return std::atomic_ref(place).load(std::memory_order_relaxed); }
void write(float& place, float value) { std::atomic_ref(place).store(value, std::memory_order_relaxed); }

// visit(feature) for each, those ahead being fetched.
template <class Address, class Visit>
void for_each_row(std::span<const uint32_t> features, Address&& address, Visit&& visit) {
  for (size_t i = 0; i < std::min(kAhead, features.size()); ++i) __builtin_prefetch(address(features[i]));
  for (size_t i = 0; i < features.size(); ++i) {
    if (i + kAhead < features.size()) __builtin_prefetch(address(features[i + kAhead]));
    visit(features[i]);
  }
}

}  // namespace

Classifier::Classifier(const FeatureSpec& spec, std::span<const float> bias, std::span<const float> weights)
    : spec_(spec), bias_(bias.begin(), bias.end()), weights_(weights.begin(), weights.end()) {}

Classifier::Classifier(const FeatureSpec& spec, std::span<const float> bias, std::span<const int8_t> int8s,
                       std::span<const float> scales)
    : spec_(spec),
      bias_(bias.begin(), bias.end()),
      int8s_(int8s.begin(), int8s.end()),
      scales_(scales.begin(), scales.end()) {}

void Classifier::predict(std::string_view utf8, Scratch& scratch, float* logits) const {
  const size_t K = bias_.size();
  scratch.features.clear();
  scratch.extractor.extract(utf8, scratch.features);
  std::fill_n(logits, K, 0.0f);
  if (int8s_.empty()) {
    const auto row = [&](uint32_t feature) { return weights_.data() + feature * K; };
    for_each_row(scratch.features, row, [&](uint32_t feature) {
      for (size_t k = 0; k < K; ++k) logits[k] += row(feature)[k];
    });
  } else {
    const auto row = [&](uint32_t feature) { return int8s_.data() + feature * K; };
    for_each_row(scratch.features, row, [&](uint32_t feature) {
      for (size_t k = 0; k < K; ++k) {
        logits[k] += static_cast<float>(row(feature)[k]) * scales_[(feature * K + k) / kBlock];
      }
    });
  }
  const float scale = 1 / std::sqrt(std::max(1.0f, static_cast<float>(scratch.features.size())));
  for (size_t k = 0; k < K; ++k) logits[k] = logits[k] * scale + bias_[k];
  softmax(logits, K);
}

void ClassifierTrainer::add(std::span<const std::string_view> texts, std::span<const uint32_t> labels,
                            size_t num_threads) {
  const size_t groups = (texts.size() + kGroup - 1) / kGroup;
  std::vector<std::vector<uint32_t>> found(groups);
  std::vector<std::vector<size_t>> sizes(groups);
  parallel_for(groups, num_threads, [&](size_t g, size_t) {
    FeatureExtractor extractor(spec_);
    for (size_t i = g * kGroup; i < std::min(texts.size(), (g + 1) * kGroup); ++i) {
      const size_t before = found[g].size();
      extractor.extract(texts[i], found[g]);
      sizes[g].push_back(found[g].size() - before);
    }
  });
  for (size_t g = 0; g < groups; ++g) {
    for (const size_t size : sizes[g]) ends_.push_back(ends_.back() + size);
    features_.insert(features_.end(), found[g].begin(), found[g].end());
  }
  labels_.insert(labels_.end(), labels.begin(), labels.end());
}

void ClassifierTrainer::fit(const TrainOptions& options) {
  num_classes_ = options.num_classes;
  for (const uint32_t label : labels_) {
    if (label >= num_classes_)
      throw std::invalid_argument("label " + std::to_string(label) + " is not below num_classes");
  }
  weights_.assign((size_t{1} << spec_.bucket_bits) * num_classes_, 0);
  bias_.assign(num_classes_, 0);
  const size_t count = labels_.size(), total = count * options.epochs;
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  uint64_t state = hash_number(options.seed);
  for (size_t epoch = 0; epoch < options.epochs; ++epoch) {
    for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[(state = hash_number(state, i)) % i]);
    parallel_for((count + kGroup - 1) / kGroup, options.num_threads, [&](size_t g, size_t) {
      for (size_t i = g * kGroup; i < std::min(count, (g + 1) * kGroup); ++i) {
        if (i + 1 < count) {
          const size_t begin = ends_[order[i + 1]], end = std::min(begin + kNextText, ends_[order[i + 1] + 1]);
          for (size_t f = begin; f < end; ++f) __builtin_prefetch(&weights_[features_[f] * num_classes_]);
        }
        const float rate =
            options.learning_rate * (1 - static_cast<float>(epoch * count + i) / static_cast<float>(total));
        if (num_classes_ == 2) {
          learn<2>(order[i], rate);
        } else {
          learn<0>(order[i], rate);
        }
      }
    });
  }
}

template <size_t kClasses>
void ClassifierTrainer::learn(size_t example, float rate) {
  const size_t K = kClasses == 0 ? num_classes_ : kClasses;
  const std::span features(features_.data() + ends_[example], ends_[example + 1] - ends_[example]);
  const float scale = 1 / std::sqrt(std::max(1.0f, static_cast<float>(features.size())));
  thread_local std::vector<float> gradient;
  gradient.assign(K, 0);
  const auto row = [&](uint32_t feature) { return weights_.data() + feature * K; };
  for_each_row(features, row, [&](uint32_t feature) {
    for (size_t k = 0; k < K; ++k) gradient[k] += read(row(feature)[k]);
  });
  for (size_t k = 0; k < K; ++k) gradient[k] = gradient[k] * scale + read(bias_[k]);
  softmax(gradient.data(), K);
  gradient[labels_[example]] -= 1;
  const auto step = [&](float* weights, float size) {
    for (size_t k = 0; k < K; ++k) write(weights[k], read(weights[k]) - size * gradient[k]);
  };
  for (const uint32_t feature : features) step(row(feature), rate * scale);
  step(bias_.data(), rate);
}

}  // namespace cs336::text
