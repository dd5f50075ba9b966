// As the CUDA kernel does it: a token is in the nucleus if the mass above it is less than top_p. The draw, an argmax
// over all tokens, is taken if it is in the nucleus; otherwise nothing below it is either, and the draw is made again
// from what is above. That is the argmax over the nucleus, without a sort.
#include "cpu/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "common/multiversion.h"
#include "cpu/exp2.h"
#include "cpu/float16.h"

namespace cs336::cpu {
namespace {

constexpr float kMax = std::numeric_limits<float>::max(), kLn2 = 0.6931471805599453f;
constexpr int64_t kBlock = 4096;  // floats that are added before the sum becomes a double
constexpr int kGroup = 4;         // tokens that share a Philox counter

INLINE float finite(float x) { return x == x ? std::min(x, kMax) : -INFINITY; }  // NaN: it is never drawn

MULTIVERSION void make_finite(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = finite(x[i]);
}

MULTIVERSION float largest(const float* x, int64_t n) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; i++) top = std::max(top, x[i]);
  return top;
}

// The sum of exp(x - top) over those that are `least` or more and above `beyond`.
MULTIVERSION double mass(const float* x, int64_t n, float top, float least, float beyond) {
  double all = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; i++) {
      const float power = exp2_of((x[i] - top) * kLog2E);
      sum += (x[i] >= least) & (x[i] > beyond) ? power : 0.f;
    }
    all += sum;
  }
  return all;
}

// (x - top) / temperature
MULTIVERSION void scale(float* x, int64_t n, float top, float temperature) {
  for (int64_t i = 0; i < n; i++) x[i] = (x[i] - top) / temperature;
}

// Bias, then what counts say.
void change(const SampleParams& p, int64_t row, float* x) {
  if (p.bias) {
    const float* bias = p.bias + row * p.bias_stride;
    for (int64_t i = 0; i < p.vocabulary; i++) x[i] = finite(x[i] + bias[i]);
  }
  if (!p.counts) return;
  const int* counts = p.counts + row * p.counts_stride;
  const float repetition = p.repetition ? p.repetition[row] : 1.f;
  const float presence = p.presence ? p.presence[row] : 0.f, frequency = p.frequency ? p.frequency[row] : 0.f;
  if (repetition == 1 && presence == 0 && frequency == 0) return;
  for (int64_t i = 0; i < p.vocabulary; i++) {
    const int count = counts[i], generated = count & (kInPrompt - 1);
    float y = x[i];
    if (count > 0) y = y > 0 ? y / repetition : y * repetition;
    y -= frequency * static_cast<float>(generated);
    x[i] = finite(generated > 0 ? y - presence : y);
  }
}

struct Words {
  uint32_t word[kGroup];
};

// Philox4x32-7 (Salmon et al. 2011).
INLINE Words philox(uint32_t index, uint64_t offset, uint64_t seed) {
  uint32_t c0 = index, c1 = static_cast<uint32_t>(offset), c2 = static_cast<uint32_t>(offset >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; round++) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The token of the largest z - log(e), e exponential, among those whose z is `least` or more and above `beyond`.
int64_t winner(const float* z, int64_t n, float least, float beyond, uint64_t seed, uint64_t offset) {
  constexpr float kMost = 33 * kLn2;  // of -log(e): u has 32 bits
  float best = -INFINITY;
  int64_t token = 0;
  for (int64_t first = 0; first < n; first += kGroup) {
    const int64_t end = std::min(n, first + kGroup);
    const float nearest = *std::max_element(z + first, z + end);
    if (!(nearest >= least && nearest > beyond && nearest + kMost >= best)) continue;
    const Words words = philox(static_cast<uint32_t>(first / kGroup), offset, seed);
    for (int64_t i = first; i < end; i++) {
      const uint32_t word = words.word[i - first];
      // -log(e) <= -log(u) <= (leading zeros + 1) log 2: most tokens cannot win, and need no logarithm.
      if (!(z[i] + static_cast<float>(std::countl_zero(word) + 1) * kLn2 >= best)) continue;
      if (!(z[i] >= least && z[i] > beyond)) continue;
      const float u = std::min((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.f - 0x1p-24f);
      const float score = z[i] - std::log(-std::log1p(-u));
      if (score > best) best = score, token = i;
    }
  }
  return token;
}

// A token of a row whose logits are in x, which it changes.
int64_t draw(const SampleParams& p, int64_t row, float* x) {
  const int64_t n = p.vocabulary;
  const float top = largest(x, n), temperature = p.temperature[row];
  if (top == -INFINITY) return 0;
  if (!(temperature > 0)) return std::find(x, x + n, top) - x;
  scale(x, n, top, std::min(temperature, kMax));
  float least = p.min_p[row] > 0 ? std::log(std::min(p.min_p[row], 1.f)) : -INFINITY;
  if (const int k = p.top_k[row]; k > 0 && k < n) {
    std::vector<float> first(k);
    std::partial_sort_copy(x, x + n, first.begin(), first.end(), std::greater<float>());
    least = std::max(least, first.back());
  }
  const bool nucleus = p.top_p[row] < 1;
  const double enough = nucleus ? p.top_p[row] * mass(x, n, 0, least, -INFINITY) : 0;
  for (float beyond = -INFINITY;;) {
    const int64_t token = winner(x, n, least, beyond, p.seeds[row], p.offsets[row]);
    if (!nucleus || x[token] == 0 || mass(x, n, 0, least, x[token]) < enough) return token;
    beyond = x[token];
  }
}

// The largest of x, the first of equal ones first.
void list(const SampleParams& p, int64_t row, const float* x, float top, float log_sum) {
  std::vector<int64_t> order(p.vocabulary);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + p.num_logprobs, order.end(),
                    [x](int64_t a, int64_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  for (int64_t i = 0; i < p.num_logprobs; i++) {
    p.top_tokens[row * p.num_logprobs + i] = order[i];
    p.top_logprobs[row * p.num_logprobs + i] = x[order[i]] - top - log_sum;
  }
}

template <typename T>
void load(const T* logits, int64_t n, float* x) {
  widen(logits, n, x);
}
void load(const float* logits, int64_t n, float* x) { std::copy(logits, logits + n, x); }

}  // namespace

void sample(const SampleParams& p, int64_t first_row, int64_t last_row) {
  std::vector<float> x(p.vocabulary);
  for (int64_t row = first_row; row < last_row; row++) {
    dispatch_dtype(p.dtype, [&]<typename T>(T) {
      const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
      load(logits, p.vocabulary, x.data());
      make_finite(x.data(), p.vocabulary);
      const float top = largest(x.data(), p.vocabulary);
      const double sum = mass(x.data(), p.vocabulary, top, -INFINITY, -INFINITY);
      const float log_sum = static_cast<float>(std::log(sum));  // apart: beside a large `top` it would be rounded away
      if (p.num_logprobs > 0) list(p, row, x.data(), top, log_sum);
      change(p, row, x.data());
      const int64_t token = draw(p, row, x.data());
      p.tokens[row] = token;
      p.logprobs[row] = finite(static_cast<float>(logits[token])) - top - log_sum;
    });
  }
}

}  // namespace cs336::cpu
