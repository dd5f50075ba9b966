// The six ops of rms_norm and layer_norm, the same for every device, over the two functions that differ: norm_forward
// and norm_backward, which norm_cpu.cpp and norm_cuda.cpp define for their libraries.
#pragma once
#include <optional>
#include <tuple>

#include "ops/tensor.h"

namespace cs336 {

struct NormOutputs {
  Tensor y, rstd;
  std::optional<Tensor> mean, sum;  // of a LayerNorm; with a residual
};

struct NormGradients {
  Tensor dx, dw;
  std::optional<Tensor> db;  // of a LayerNorm
};

// A null pointer is an absent argument. The arguments are checked and nothing is allocated yet.
NormOutputs norm_forward(const Tensor& x, const Tensor* residual, const Tensor& w, const Tensor* b, double eps,
                         bool centred);
NormGradients norm_backward(const Tensor& dy, const Tensor* dsum, const Tensor& x, const Tensor& w, const Tensor* mean,
                            const Tensor& rstd);

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline Tensor new_rows(const Tensor& x) { return new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type()); }

inline Tensor new_row_stat(const Tensor& x) { return new_tensor(x, {x.size(0)}, ScalarType::Float); }

inline Tensor new_features(const Tensor& w) { return new_tensor(w, {w.size(0)}, w.scalar_type()); }

inline NormOutputs new_norm_outputs(const Tensor& x, const Tensor* residual, bool centred) {
  NormOutputs out{.y = new_rows(x), .rstd = new_row_stat(x), .mean = {}, .sum = {}};
  if (centred) out.mean = new_row_stat(x);
  if (residual) out.sum = new_rows(x);
  return out;
}

inline NormGradients new_norm_gradients(const Tensor& x, const Tensor& w, bool centred) {
  NormGradients out{.dx = new_rows(x), .dw = new_features(w), .db = {}};
  if (centred) out.db = new_features(w);
  return out;
}

inline NormOutputs checked_norm_forward(const Tensor& x, const Tensor* residual, const Tensor& w, const Tensor* b,
                                        double eps, bool centred) {
  check_rows(x, "x");
  float_dtype_of(x, "x");
  if (residual) check_rows_like(*residual, "residual", x, "x");
  check_features(w, "w", x);
  if (b) {
    check_features(*b, "b", x);
    STD_TORCH_CHECK(b->scalar_type() == w.scalar_type(), "b must have the dtype of w");
  }
  return norm_forward(x, residual, w, b, eps, centred);
}

inline NormGradients checked_norm_backward(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x,
                                           const Tensor& w, const Tensor* mean, const Tensor& rstd) {
  check_rows(x, "x");
  float_dtype_of(x, "x");
  check_rows_like(dy, "dy", x, "x");
  if (dsum) check_rows_like(*dsum, "dsum", x, "x");
  check_features(w, "w", x);
  if (mean) check_row_stat(*mean, "mean", x);
  check_row_stat(rstd, "rstd", x);
  return norm_backward(dy, dsum ? &*dsum : nullptr, x, w, mean, rstd);
}

inline std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Tensor& w, double eps) {
  const NormOutputs out = checked_norm_forward(x, nullptr, w, nullptr, eps, false);
  return {out.y, out.rstd};
}

inline std::tuple<Tensor, Tensor, Tensor> rms_norm_residual_fwd(const Tensor& x, const Tensor& residual,
                                                                const Tensor& w, double eps) {
  const NormOutputs out = checked_norm_forward(x, &residual, w, nullptr, eps, false);
  return {out.y, out.rstd, *out.sum};
}

inline std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x,
                                               const Tensor& w, const Tensor& rstd) {
  const NormGradients out = checked_norm_backward(dy, dsum, x, w, nullptr, rstd);
  return {out.dx, out.dw};
}

inline std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Tensor& w,
                                                         const std::optional<Tensor>& b, double eps) {
  const NormOutputs out = checked_norm_forward(x, nullptr, w, b ? &*b : nullptr, eps, true);
  return {out.y, *out.mean, out.rstd};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_residual_fwd(const Tensor& x, const Tensor& residual,
                                                                          const Tensor& w,
                                                                          const std::optional<Tensor>& b, double eps) {
  const NormOutputs out = checked_norm_forward(x, &residual, w, b ? &*b : nullptr, eps, true);
  return {out.y, *out.mean, out.rstd, *out.sum};
}

inline std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dsum,
                                                         const Tensor& x, const Tensor& w, const Tensor& mean,
                                                         const Tensor& rstd) {
  const NormGradients out = checked_norm_backward(dy, dsum, x, w, &mean, rstd);
  return {out.dx, out.dw, *out.db};
}

template <typename Library>
void register_norms(Library& m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  m.impl("rms_norm_residual_fwd", TORCH_BOX(&rms_norm_residual_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_residual_fwd", TORCH_BOX(&layer_norm_residual_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}

}  // namespace cs336
