// torch.ops.cs336.{rms,layer}_norm_{fwd,residual_fwd,bwd} on CPU: check, allocate, share the rows among torch's
// threads.
#include "cpu/norm.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>

#include "ops/norm.h"

namespace cs336 {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth a thread

Tensor new_rows(const Tensor& x) { return new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type()); }

Tensor new_row_stat(const Tensor& x) { return new_tensor(x, {x.size(0)}, ScalarType::Float); }

Tensor new_features(const Tensor& w) { return new_tensor(w, {w.size(0)}, w.scalar_type()); }

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// The values of t in float32: its own memory if it has them.
class Floats {
 public:
  explicit Floats(const Tensor* t) {
    if (!t) return;
    if (t->scalar_type() == ScalarType::Float) {
      values_ = static_cast<const float*>(t->const_data_ptr());
    } else {
      copy_ = std::make_unique_for_overwrite<float[]>(t->numel());
      to_floats(t->const_data_ptr(), dtype_of(*t, "weight"), t->numel(), copy_.get());
      values_ = copy_.get();
    }
  }
  const float* get() const { return values_; }

 private:
  std::unique_ptr<float[]> copy_;
  const float* values_ = nullptr;
};

struct Outputs {
  Tensor y, rstd;
  std::optional<Tensor> mean, sum;
};

Outputs forward(const Tensor& x, const Tensor* residual, const Tensor& w, const Tensor* b, double eps, bool centred) {
  check_norm_fwd(x, residual, w, b);
  Outputs out{.y = new_rows(x), .rstd = new_row_stat(x), .mean = {}, .sum = {}};
  if (centred) out.mean = new_row_stat(x);
  if (residual) out.sum = new_rows(x);
  const Floats w_values(&w), b_values(b);
  const NormFwdParams p{.x = x.const_data_ptr(),
                        .residual = residual ? residual->const_data_ptr() : nullptr,
                        .w = w_values.get(),
                        .b = b_values.get(),
                        .y = out.y.mutable_data_ptr(),
                        .sum = residual ? out.sum->mutable_data_ptr() : nullptr,
                        .mean = centred ? floats(*out.mean) : nullptr,
                        .rstd = floats(out.rstd),
                        .N = x.size(1),
                        .x_stride = x.stride(0),
                        .residual_stride = residual ? residual->stride(0) : 0,
                        .eps = static_cast<float>(eps),
                        .dtype = dtype_of(x, "x")};
  torch::stable::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / p.N),
                              [&](int64_t first, int64_t last) { norm_fwd(p, first, last); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor* dsum, const Tensor& x, const Tensor& w,
                                            const Tensor* mean, const Tensor& rstd) {
  check_norm_bwd(dy, dsum, x, w, mean, rstd);
  // Chunks depend on the shape alone, so the sums over rows do not depend on the number of threads. About as many
  // chunks as rows in each: the shortest chains of additions.
  const int64_t M = x.size(0), N = x.size(1), chunk = std::max<int64_t>(16, std::ceil(std::sqrt(M)));
  const int64_t num_chunks = (M + chunk - 1) / chunk;
  Tensor dx = new_rows(x), dw = new_features(w), db = mean ? new_features(w) : dw;
  const Tensor partials = new_tensor(x, {mean ? 2 : 1, num_chunks, N}, ScalarType::Float);
  const Floats w_values(&w);
  const NormBwdParams p{.dy = dy.const_data_ptr(),
                        .dsum = dsum ? dsum->const_data_ptr() : nullptr,
                        .x = x.const_data_ptr(),
                        .w = w_values.get(),
                        .mean = mean ? static_cast<const float*>(mean->const_data_ptr()) : nullptr,
                        .rstd = static_cast<const float*>(rstd.const_data_ptr()),
                        .dx = dx.mutable_data_ptr(),
                        .dw_partials = floats(partials),
                        .db_partials = floats(partials) + num_chunks * N,
                        .M = M,
                        .N = N,
                        .chunk = chunk,
                        .dy_stride = dy.stride(0),
                        .dsum_stride = dsum ? dsum->stride(0) : 0,
                        .x_stride = x.stride(0),
                        .dtype = dtype_of(x, "x")};
  torch::stable::parallel_for(0, num_chunks, std::max<int64_t>(1, kGrain / (chunk * N)),
                              [&](int64_t first, int64_t last) { norm_bwd(p, first, last); });
  torch::stable::parallel_for(0, N, std::max<int64_t>(64, kGrain / (num_chunks + 1)), [&](int64_t begin, int64_t end) {
    const Dtype dtype = dtype_of(w, "w");
    norm_bwd_reduce(p.dw_partials, num_chunks, N, begin, end, dw.mutable_data_ptr(), dtype);
    if (mean) norm_bwd_reduce(p.db_partials, num_chunks, N, begin, end, db.mutable_data_ptr(), dtype);
  });
  return {dx, dw, db};
}

std::tuple<Tensor, Tensor> rms_norm_fwd_cpu(const Tensor& x, const Tensor& w, double eps) {
  const Outputs out = forward(x, nullptr, w, nullptr, eps, false);
  return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_residual_fwd_cpu(const Tensor& x, const Tensor& residual, const Tensor& w,
                                                             double eps) {
  const Outputs out = forward(x, &residual, w, nullptr, eps, false);
  return {out.y, out.rstd, *out.sum};
}

std::tuple<Tensor, Tensor> rms_norm_bwd_cpu(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x,
                                            const Tensor& w, const Tensor& rstd) {
  const auto [dx, dw, _] = backward(dy, pointer(dsum), x, w, nullptr, rstd);
  return {dx, dw};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd_cpu(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b,
                                                      double eps) {
  const Outputs out = forward(x, nullptr, w, pointer(b), eps, true);
  return {out.y, *out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_residual_fwd_cpu(const Tensor& x, const Tensor& residual,
                                                                       const Tensor& w, const std::optional<Tensor>& b,
                                                                       double eps) {
  const Outputs out = forward(x, &residual, w, pointer(b), eps, true);
  return {out.y, *out.mean, out.rstd, *out.sum};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd_cpu(const Tensor& dy, const std::optional<Tensor>& dsum,
                                                      const Tensor& x, const Tensor& w, const Tensor& mean,
                                                      const Tensor& rstd) {
  return backward(dy, pointer(dsum), x, w, &mean, rstd);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd_cpu));
  m.impl("rms_norm_residual_fwd", TORCH_BOX(&rms_norm_residual_fwd_cpu));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd_cpu));
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd_cpu));
  m.impl("layer_norm_residual_fwd", TORCH_BOX(&layer_norm_residual_fwd_cpu));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd_cpu));
}

}  // namespace cs336
