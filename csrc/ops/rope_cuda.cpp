// Rotary position embedding on CUDA: check, allocate, guard, launch.
#include "kernels/rope.h"

#include <optional>
#include <vector>

#include "ops/tensor.h"

namespace cs336 {
namespace {

using TensorList = std::vector<Tensor>;

int64_t last_stride(const Tensor& t) { return t.size(t.dim() - 1) <= 1 ? 1 : t.stride(t.dim() - 1); }

void check_heads(const Tensor& x, const Tensor& first) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be (B, H, S, D), got ", x.dim(), " dims");
  for (int d : {0, 2, 3}) STD_TORCH_CHECK(x.size(d) == first.size(d), "xs must have one shape but for their heads");
  STD_TORCH_CHECK(x.scalar_type() == first.scalar_type(), "xs must have one dtype");
  check_device(x, "xs", first);
  STD_TORCH_CHECK(x.size(3) >= 1 && x.size(3) <= cuda::kMaxRopeDim, "x must have 1 to ", cuda::kMaxRopeDim,
                  " features, got ", x.size(3));
  STD_TORCH_CHECK(last_stride(x) == 1, "x must be contiguous in its last dim");
  STD_TORCH_CHECK(x.size(0) * x.size(2) < int64_t{1} << 31 && x.size(1) < int64_t{1} << 16, "x must be smaller");
}

// 0 where all sequences share one.
int64_t batch_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : 0; }

void set_tables(cuda::RopeParams& p, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
                const Tensor& x) {
  const int64_t B = x.size(0), S = x.size(2);
  const auto of_each = [&](const Tensor& t) { return (t.size(0) == 1 || t.size(0) == B) && t.size(1) == S; };
  STD_TORCH_CHECK(positions ? cos.dim() == 2 : cos.dim() == 3 && of_each(cos), "cos must be ",
                  positions ? "(L, P) beside positions" : "(1 or B, S, P)");
  const int last = static_cast<int>(cos.dim()) - 1;
  STD_TORCH_CHECK(2 * cos.size(last) <= x.size(3), "cos must have 2 P <= ", x.size(3), ", got P = ", cos.size(last));
  STD_TORCH_CHECK(sin.dim() == cos.dim(), "sin must be like cos");
  for (int d = 0; d <= last; d++)
    STD_TORCH_CHECK(sin.size(d) == cos.size(d) && sin.stride(d) == cos.stride(d), "sin must be like cos");
  STD_TORCH_CHECK(last_stride(cos) == 1, "cos must be contiguous in its last dim");
  for (const Tensor* table : {&cos, &sin}) {
    STD_TORCH_CHECK(table->scalar_type() == ScalarType::Float, "cos and sin must be float32");
    check_device(*table, "cos and sin", x);
  }
  p.cos = static_cast<const float*>(cos.const_data_ptr());
  p.sin = static_cast<const float*>(sin.const_data_ptr());
  p.P = static_cast<int>(cos.size(last));
  p.L = cos.size(last - 1);
  p.table_s = cos.stride(last - 1);
  if (!positions) {
    p.table_b = batch_stride(cos);
    return;
  }
  const auto dtype = positions->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, "positions must be int64 or int32");
  STD_TORCH_CHECK(positions->dim() == 2 && of_each(*positions), "positions must be (1 or B, S)");
  check_device(*positions, "positions", x);
  p.positions = positions->const_data_ptr();
  p.wide_positions = dtype == ScalarType::Long;
  p.position_b = batch_stride(*positions);
  p.position_s = positions->stride(1);
}

TensorList rope_fwd(const TensorList& xs, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
                    bool interleaved, bool inverse) {
  STD_TORCH_CHECK(xs.size() == 1 || xs.size() == 2, "xs must be one or two tensors, got ", xs.size());
  for (const Tensor& x : xs) check_heads(x, xs[0]);
  const Tensor& first = xs[0];
  cuda::RopeParams p{};
  p.B = static_cast<int>(first.size(0));
  p.S = static_cast<int>(first.size(2));
  p.D = static_cast<int>(first.size(3));
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.dtype = float_dtype_of(first, "x");
  set_tables(p, cos, sin, positions, first);
  torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  TensorList ys;
  for (size_t i = 0; i < xs.size(); i++) {
    const Tensor& x = xs[i];
    ys.push_back(torch::stable::empty_like(x));
    Tensor& y = ys.back();
    p.heads[i] = {.x = x.const_data_ptr(),
                  .y = y.mutable_data_ptr(),
                  .x_b = x.stride(0),
                  .x_h = x.stride(1),
                  .x_s = x.stride(2),
                  .y_b = y.stride(0),
                  .y_h = y.stride(1),
                  .y_s = y.stride(2),
                  .H = static_cast<int>(x.size(1))};
  }
  cuda::rope(p, current_stream(first));
  return ys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) { m.impl("rope_fwd", TORCH_BOX(&rope_fwd)); }

}  // namespace cs336
