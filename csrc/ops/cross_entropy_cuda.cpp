// Cross-entropy on CUDA: check, allocate, guard, launch.
#include "kernels/cross_entropy.h"

#include <optional>
#include <tuple>

#include "ops/tensor.h"

namespace cs336 {
namespace {

struct Options {
  int64_t ignore_index;
  std::optional<double> softcap;
  double z_loss, label_smoothing;
};

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

const float* row_stat(const Tensor& s, const char* name, const Tensor& logits) {
  check_row_stat(s, name, logits);
  return static_cast<const float*>(s.const_data_ptr());
}

const float* row_stat(const std::optional<Tensor>& s, const char* name, const Tensor& logits) {
  return s ? row_stat(*s, name, logits) : nullptr;
}

cuda::CrossEntropyRows checked_rows(const Tensor& logits, const Tensor& targets, const Options& options) {
  check_rows(logits, "logits");
  STD_TORCH_CHECK(logits.size(1) < int64_t{1} << 30, "logits must have fewer than 2^30 columns");
  STD_TORCH_CHECK(logits.size(0) < int64_t{1} << 31, "logits must have fewer than 2^31 rows");
  STD_TORCH_CHECK(targets.dim() == 1 && targets.size(0) == logits.size(0), "targets must have one element a row");
  STD_TORCH_CHECK(targets.size(0) <= 1 || targets.stride(0) == 1, "targets must be contiguous");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long, "targets must be int64");
  check_device(targets, "targets", logits);
  STD_TORCH_CHECK(!options.softcap || *options.softcap > 0, "softcap must be positive");
  STD_TORCH_CHECK(options.z_loss >= 0, "z_loss must not be negative");
  STD_TORCH_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, "label_smoothing must be in [0, 1]");
  return {.logits = logits.const_data_ptr(),
          .targets = static_cast<const int64_t*>(targets.const_data_ptr()),
          .N = logits.size(0),
          .V = logits.size(1),
          .stride = logits.stride(0),
          .dtype = float_dtype_of(logits, "logits"),
          .options = {.ignore_index = options.ignore_index,
                      .softcap = static_cast<float>(options.softcap.value_or(0)),
                      .z_loss = static_cast<float>(options.z_loss),
                      .label_smoothing = static_cast<float>(options.label_smoothing)}};
}

Tensor new_row_stat(const Tensor& logits, bool wanted = true) {
  return new_tensor(logits, {wanted ? logits.size(0) : 0}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                                                     std::optional<double> softcap, double z_loss,
                                                     double label_smoothing, bool with_entropy) {
  const auto rows = checked_rows(logits, targets, {ignore_index, softcap, z_loss, label_smoothing});
  torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor loss = new_row_stat(logits), lse = new_row_stat(logits), entropy = new_row_stat(logits, with_entropy);
  cuda::cross_entropy_fwd({.rows = rows,
                           .loss = floats(loss),
                           .lse = floats(lse),
                           .entropy = with_entropy ? floats(entropy) : nullptr,
                           .scale = nullptr},
                          current_stream(logits));
  return {loss, lse, entropy};
}

Tensor cross_entropy_bwd(const Tensor& logits, const Tensor& targets, const Tensor& lse, const Tensor& entropy,
                         const Tensor& dloss, const std::optional<Tensor>& dlse, const std::optional<Tensor>& dentropy,
                         int64_t ignore_index, std::optional<double> softcap, double z_loss, double label_smoothing) {
  const auto rows = checked_rows(logits, targets, {ignore_index, softcap, z_loss, label_smoothing});
  cuda::CrossEntropyBwdParams p{.rows = rows,
                                .lse = row_stat(lse, "lse", logits),
                                .entropy = dentropy ? row_stat(entropy, "entropy", logits) : nullptr,
                                .dloss = row_stat(dloss, "dloss", logits),
                                .dlse = row_stat(dlse, "dlse", logits),
                                .dentropy = row_stat(dentropy, "dentropy", logits),
                                .dlogits = nullptr};
  torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor dlogits = new_tensor(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  p.dlogits = dlogits.mutable_data_ptr();
  cuda::cross_entropy_bwd(p, current_stream(logits));
  return dlogits;
}

std::tuple<Tensor, Tensor> cross_entropy_gradient_(const Tensor& logits, const Tensor& targets, const Tensor& scale,
                                                   int64_t ignore_index, std::optional<double> softcap, double z_loss,
                                                   double label_smoothing) {
  const auto rows = checked_rows(logits, targets, {ignore_index, softcap, z_loss, label_smoothing});
  STD_TORCH_CHECK(logits.size(0) <= 1 || logits.stride(0) >= logits.size(1), "rows of logits must not overlap");
  STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, "scale must be one float32 element");
  check_device(scale, "scale", logits);
  torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor loss = new_row_stat(logits), lse = new_row_stat(logits);
  cuda::cross_entropy_fwd({.rows = rows,
                           .loss = floats(loss),
                           .lse = floats(lse),
                           .entropy = nullptr,
                           .scale = static_cast<const float*>(scale.const_data_ptr())},
                          current_stream(logits));
  return {loss, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
}

}  // namespace cs336
