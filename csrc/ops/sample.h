// torch.ops.cs336.sample: check, allocate, fill in.
#pragma once
#include <optional>
#include <tuple>

#include "common/sample_params.h"
#include "ops/tensor.h"

namespace cs336 {

using Optional = std::optional<Tensor>;

inline void check_of_rows(const Tensor& t, const char* name, ScalarType dtype, const Tensor& logits) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == logits.size(0), name, " must have shape (", logits.size(0), ",)");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must have the dtype that the schema's documentation says");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  check_device(t, name, logits);
}

inline void check_of_tokens(const Optional& t, const char* name, ScalarType dtype, const Tensor& logits) {
  if (!t) return;
  check_rows(*t, name);
  STD_TORCH_CHECK(t->size(0) == logits.size(0) && t->size(1) == logits.size(1), name, " must have the shape of logits");
  STD_TORCH_CHECK(t->scalar_type() == dtype, name, " must be ", dtype == ScalarType::Int ? "int32" : "float32");
  check_device(*t, name, logits);
}

template <typename T>
const T* pointer(const Optional& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// The op, whose work `run` does: on rows that are there, with `logits` for its device.
template <void (*run)(const SampleParams&, const Tensor& logits)>
std::tuple<Tensor, Tensor, Tensor, Tensor> sample_op(const Tensor& logits, const Tensor& temperature,
                                                     const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
                                                     const Tensor& seeds, const Tensor& offsets, const Optional& counts,
                                                     const Optional& repetition, const Optional& presence,
                                                     const Optional& frequency, const Optional& bias,
                                                     int64_t num_logprobs) {
  check_rows(logits, "logits");
  const Dtype dtype = float_dtype_of(logits, "logits");
  const int64_t B = logits.size(0), V = logits.size(1);
  STD_TORCH_CHECK(B < int64_t{1} << 27, "logits must have fewer than 2^27 rows, got ", B);
  STD_TORCH_CHECK(V < int64_t{1} << 31, "logits must have fewer than 2^31 tokens, got ", V);
  check_of_rows(temperature, "temperature", ScalarType::Float, logits);
  check_of_rows(top_k, "top_k", ScalarType::Int, logits);
  check_of_rows(top_p, "top_p", ScalarType::Float, logits);
  check_of_rows(min_p, "min_p", ScalarType::Float, logits);
  check_of_rows(seeds, "seeds", ScalarType::Long, logits);
  check_of_rows(offsets, "offsets", ScalarType::Long, logits);
  check_of_tokens(counts, "counts", ScalarType::Int, logits);
  check_of_tokens(bias, "bias", ScalarType::Float, logits);
  if (repetition) check_of_rows(*repetition, "repetition_penalty", ScalarType::Float, logits);
  if (presence) check_of_rows(*presence, "presence_penalty", ScalarType::Float, logits);
  if (frequency) check_of_rows(*frequency, "frequency_penalty", ScalarType::Float, logits);
  STD_TORCH_CHECK(counts || !(repetition || presence || frequency), "penalties need counts");
  STD_TORCH_CHECK(num_logprobs >= 0 && num_logprobs <= V, "num_logprobs must be from 0 to ", V, ", got ", num_logprobs);

  Tensor tokens = new_tensor(logits, {B}, ScalarType::Long), logprobs = new_tensor(logits, {B}, ScalarType::Float);
  Tensor top_tokens = new_tensor(logits, {B, num_logprobs}, ScalarType::Long);
  Tensor top_logprobs = new_tensor(logits, {B, num_logprobs}, ScalarType::Float);
  if (B == 0) return {tokens, logprobs, top_tokens, top_logprobs};
  run({.logits = logits.const_data_ptr(),
       .logits_stride = logits.stride(0),
       .temperature = static_cast<const float*>(temperature.const_data_ptr()),
       .top_k = static_cast<const int*>(top_k.const_data_ptr()),
       .top_p = static_cast<const float*>(top_p.const_data_ptr()),
       .min_p = static_cast<const float*>(min_p.const_data_ptr()),
       .seeds = static_cast<const int64_t*>(seeds.const_data_ptr()),
       .offsets = static_cast<const int64_t*>(offsets.const_data_ptr()),
       .counts = pointer<int>(counts),
       .counts_stride = counts ? counts->stride(0) : 0,
       .repetition = pointer<float>(repetition),
       .presence = pointer<float>(presence),
       .frequency = pointer<float>(frequency),
       .bias = pointer<float>(bias),
       .bias_stride = bias ? bias->stride(0) : 0,
       .tokens = static_cast<int64_t*>(tokens.mutable_data_ptr()),
       .logprobs = static_cast<float*>(logprobs.mutable_data_ptr()),
       .top_tokens = static_cast<int64_t*>(top_tokens.mutable_data_ptr()),
       .top_logprobs = static_cast<float*>(top_logprobs.mutable_data_ptr()),
       .rows = static_cast<int>(B),
       .vocabulary = static_cast<int>(V),
       .num_logprobs = static_cast<int>(num_logprobs),
       .dtype = dtype},
      logits);
  return {tokens, logprobs, top_tokens, top_logprobs};
}

}  // namespace cs336
