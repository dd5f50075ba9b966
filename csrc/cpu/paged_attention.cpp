// Keys and values are widened a block at a time and shared by all rows, a row being a query token of a query head.
// Blocks start at multiples of kBlock whatever the queries, and each row's softmax runs over them in order.
#include "cpu/paged_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/multiversion.h"
#include "cpu/exp2.h"
#include "cpu/float16.h"

namespace cs336::cpu {
namespace {

constexpr int64_t kBlock = 64;  // keys
constexpr float kLn2 = 0.6931471805599453f;

INLINE const float* widened(const float* row, int64_t, float*) { return row; }
template <typename T>
INLINE const float* widened(const T* row, int64_t n, float* scratch) {
  for (int64_t i = 0; i < n; i++) scratch[i] = static_cast<float>(row[i]);
  return scratch;
}

struct Row {  // what a row has summed up, in powers of 2
  float top = -INFINITY, sum = 0.f;
};

// Rows of the block's keys or values as floats, in `rows`; those of floats stay where they are.
template <typename T>
INLINE void gather(const PagedAttentionParams& p, const PagedCache& cache, const PagedUnit& u, int64_t begin,
                   int64_t end, float* scratch, const float** rows) {
  for (int64_t key = begin; key < end; key++) {
    const int64_t page = p.page_table[u.b * p.table_stride + key / p.page_size];
    const T* row = static_cast<const T*>(cache.data) + page * cache.page_stride +
                   key % p.page_size * cache.token_stride + u.head * cache.head_stride;
    rows[key - begin] = widened(row, cache.features, scratch + (key - begin) * cache.features);
  }
}

INLINE float dot(const float* a, const float* b, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// Adds n keys that the row sees to its softmax.
INLINE void add(const PagedAttentionParams& p, const float* q, const float* const* keys, const float* const* values,
                int64_t n, Row& row, float* o) {
  const int64_t D = p.k.features, E = p.v.features;
  alignas(64) float s[kBlock];
  for (int64_t j = 0; j < n; j++) s[j] = dot(q, keys[j], D) * p.scale;
  if (p.softcap > 0)
    for (int64_t j = 0; j < n; j++) s[j] = p.softcap * std::tanh(s[j] / p.softcap);
  float top = row.top;
  for (int64_t j = 0; j < n; j++) s[j] *= kLog2E, top = std::max(top, s[j]);
  const float fade = exp2_of(row.top - top);  // 0 at first: -inf is below everything
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; j++) s[j] = exp2_of(s[j] - top), sum += s[j];
  row.top = top;
  row.sum = row.sum * fade + sum;
#pragma omp simd
  for (int64_t e = 0; e < E; e++) o[e] *= fade;
  for (int64_t j = 0; j < n; j++) {
    const float weight = s[j], *value = values[j];
#pragma omp simd
    for (int64_t e = 0; e < E; e++) o[e] += weight * value[e];
  }
}

template <typename T>
MULTIVERSION void attend(const PagedAttentionParams& p, const PagedUnit& u, float* scratch, Row* rows) {
  const int64_t D = p.k.features, E = p.v.features, group = p.heads / p.kv_heads, num_rows = (u.last - u.first) * group;
  const int64_t length = p.seq_lens[u.b], start = p.cu_seqlens_q ? p.cu_seqlens_q[u.b] : u.b * p.queries;
  const int64_t queries = p.cu_seqlens_q ? p.cu_seqlens_q[u.b + 1] - start : p.queries;
  float *q = scratch, *o = q + num_rows * D, *k = o + num_rows * E, *v = k + kBlock * D;
  const float *keys[kBlock], *values[kBlock];
  const T* base = static_cast<const T*>(p.q) + (p.cu_seqlens_q ? start * p.q_token_stride : u.b * p.q_batch_stride);
  for (int64_t r = 0; r < num_rows; r++) {
    const T* row = base + (u.first + r / group) * p.q_token_stride + (u.head * group + r % group) * p.q_head_stride;
    for (int64_t i = 0; i < D; i++) q[r * D + i] = static_cast<float>(row[i]);
  }
  std::fill_n(o, num_rows * E, 0.f);
  std::fill_n(rows, num_rows, Row());
  const auto position = [&](int64_t query) { return length - queries + query; };
  const auto sees_from = [&](int64_t query) {
    return p.window < 0 ? 0 : std::max<int64_t>(0, position(query) - p.window);
  };
  const int64_t end = std::max<int64_t>(0, position(u.last - 1) + 1);
  for (int64_t begin = sees_from(u.first) / kBlock * kBlock; begin < end; begin += kBlock) {
    const int64_t stop = std::min(end, begin + kBlock), from = std::max(begin, sees_from(u.first));
    gather<T>(p, p.k, u, from, stop, k, keys);
    gather<T>(p, p.v, u, from, stop, v, values);
    for (int64_t r = 0; r < num_rows; r++) {
      const int64_t query = u.first + r / group, least = std::max(from, sees_from(query));
      const int64_t n = std::min(stop, position(query) + 1) - least;
      if (n > 0) add(p, q + r * D, keys + (least - from), values + (least - from), n, rows[r], o + r * E);
    }
  }
  for (int64_t r = 0; r < num_rows; r++) {
    const int64_t query = u.first + r / group, token = start + query, head = u.head * group + r % group;
    float top = rows[r].top, sum = rows[r].sum, scale = 1.f;
    if (p.sinks && p.sinks[head] > -INFINITY) {
      const float sink = p.sinks[head] * kLog2E, largest = std::max(top, sink);
      scale = exp2_of(top - largest);
      sum = sum * scale + exp2_of(sink - largest);
      top = largest;
    }
    scale = sum > 0 ? scale / sum : 0.f;
    T* out = static_cast<T*>(p.o) + (token * p.heads + head) * E;
    for (int64_t e = 0; e < E; e++) out[e] = static_cast<T>(o[r * E + e] * scale);
    float& lse = p.lse[p.cu_seqlens_q ? head * p.tokens + token : (u.b * p.heads + head) * p.queries + query];
    lse = sum > 0 ? (top + std::log2(sum)) * kLn2 : -INFINITY;
  }
}

}  // namespace

void paged_attention(const PagedAttentionParams& p, const PagedUnit* units, int64_t count) {
  const int64_t D = p.k.features, E = p.v.features, rows = kPagedQueries * (p.heads / p.kv_heads);
  std::vector<float> scratch((rows + kBlock) * (D + E));
  std::vector<Row> sums(rows);
  for (int64_t i = 0; i < count; i++)
    dispatch_dtype(p.dtype, [&]<typename T>(T) { attend<T>(p, units[i], scratch.data(), sums.data()); });
}

}  // namespace cs336::cpu
