// The norms on CPU: allocate, share the rows among torch's threads.
#include "cpu/norm.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "ops/norm.h"

namespace cs336 {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth a thread

// The values of t in float32: its own memory if it has them.
class Floats {
 public:
  explicit Floats(const Tensor* t) {
    if (!t) return;
    if (t->scalar_type() == ScalarType::Float) {
      values_ = static_cast<const float*>(t->const_data_ptr());
    } else {
      copy_ = std::make_unique_for_overwrite<float[]>(t->numel());
      cpu::to_floats(t->const_data_ptr(), float_dtype_of(*t, "weight"), t->numel(), copy_.get());
      values_ = copy_.get();
    }
  }
  const float* get() const { return values_; }

 private:
  std::unique_ptr<float[]> copy_;
  const float* values_ = nullptr;
};

}  // namespace

NormOutputs norm_forward(const Tensor& x, const Tensor* residual, const Tensor& w, const Tensor* b, double eps,
                         bool centred) {
  NormOutputs out = new_norm_outputs(x, residual, centred);
  const Floats w_values(&w), b_values(b);
  const cpu::NormFwdParams p{.x = x.const_data_ptr(),
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
                             .centred = centred,
                             .dtype = float_dtype_of(x, "x")};
  torch::stable::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / p.N),
                              [&](int64_t first, int64_t last) { cpu::norm_fwd(p, first, last); });
  return out;
}

NormGradients norm_backward(const Tensor& dy, const Tensor* dsum, const Tensor& x, const Tensor& w, const Tensor* mean,
                            const Tensor& rstd) {
  // Chunks depend on the shape alone, so the sums over rows do not depend on the number of threads. About as many
  // chunks as rows in each: the shortest chains of additions.
  const int64_t M = x.size(0), N = x.size(1), chunk = std::max<int64_t>(16, std::ceil(std::sqrt(M)));
  const int64_t num_chunks = (M + chunk - 1) / chunk;
  NormGradients out = new_norm_gradients(x, w, mean);
  const Tensor partials = new_tensor(x, {mean ? 2 : 1, num_chunks, N}, ScalarType::Float);
  const Floats w_values(&w);
  const cpu::NormBwdParams p{.dy = dy.const_data_ptr(),
                             .dsum = dsum ? dsum->const_data_ptr() : nullptr,
                             .x = x.const_data_ptr(),
                             .w = w_values.get(),
                             .mean = mean ? static_cast<const float*>(mean->const_data_ptr()) : nullptr,
                             .rstd = static_cast<const float*>(rstd.const_data_ptr()),
                             .dx = out.dx.mutable_data_ptr(),
                             .dw_partials = floats(partials),
                             .db_partials = floats(partials) + num_chunks * N,
                             .M = M,
                             .N = N,
                             .chunk = chunk,
                             .dy_stride = dy.stride(0),
                             .dsum_stride = dsum ? dsum->stride(0) : 0,
                             .x_stride = x.stride(0),
                             .centred = mean != nullptr,
                             .dtype = float_dtype_of(x, "x")};
  torch::stable::parallel_for(0, num_chunks, std::max<int64_t>(1, kGrain / (chunk * N)),
                              [&](int64_t first, int64_t last) { cpu::norm_bwd(p, first, last); });
  const Dtype dtype = float_dtype_of(w, "w");
  torch::stable::parallel_for(0, N, std::max<int64_t>(64, kGrain / (num_chunks + 1)), [&](int64_t begin, int64_t end) {
    cpu::norm_bwd_reduce(p.dw_partials, num_chunks, N, begin, end, out.dw.mutable_data_ptr(), dtype);
    if (mean) cpu::norm_bwd_reduce(p.db_partials, num_chunks, N, begin, end, out.db->mutable_data_ptr(), dtype);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(cs336, CPU, m) { register_norms(m); }

}  // namespace cs336
