// What the bindings of rms_norm and layer_norm check before they touch memory. A null pointer is an absent argument.
#pragma once
#include "ops/tensor.h"

namespace cs336 {

inline void check_norm_fwd(const Tensor& x, const Tensor* residual, const Tensor& w, const Tensor* b) {
  check_rows(x, "x");
  dtype_of(x, "x");
  if (residual) check_rows_like(*residual, "residual", x, "x");
  check_features(w, "w", x);
  if (b) {
    check_features(*b, "b", x);
    STD_TORCH_CHECK(b->scalar_type() == w.scalar_type(), "b must have the dtype of w");
  }
}

inline void check_norm_bwd(const Tensor& dy, const Tensor* dsum, const Tensor& x, const Tensor& w, const Tensor* mean,
                           const Tensor& rstd) {
  check_norm_fwd(x, nullptr, w, nullptr);
  check_rows_like(dy, "dy", x, "x");
  if (dsum) check_rows_like(*dsum, "dsum", x, "x");
  if (mean) check_row_stat(*mean, "mean", x);
  check_row_stat(rstd, "rstd", x);
}

inline const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

}  // namespace cs336
