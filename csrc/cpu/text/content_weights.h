#pragma once
#include <cstddef>
#include <string_view>
#include <utility>
namespace cs336::text {
constexpr size_t kContentHidden = 16;
struct ContentNet {
  const float *mean, *inverse_std, *hidden, *hidden_bias, *out;
  float bias;
};
inline constexpr float kZero[4096] = {};
inline constexpr ContentNet kFirstNet = {kZero,kZero,kZero,kZero,kZero,0}, kSecondNet=kFirstNet;
inline constexpr std::pair<std::string_view, float> kHintWeights[] = {{"comment", 0.0f}};
}
