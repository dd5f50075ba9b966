// torch.ops.cs336.sharded_adamw_* on CUDA: check, guard, queue. Communicators are opened by number from
// cs336/parallel/nccl.py, through the C functions at the end.
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/sharded_adamw_stream.h"
#include "ops/tensor.h"

namespace cs336 {
namespace {

using Stream = cuda::ShardedAdamwStream;

class Streams {
 public:
  std::shared_ptr<Stream> get(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = open_.find(number);
    STD_TORCH_CHECK(found != open_.end(), "comm must be the number of a communicator with NCCL, got ", number);
    return found->second;
  }

  void put(int64_t number, std::shared_ptr<Stream> stream) {
    const std::lock_guard lock(mutex_);
    open_[number] = std::move(stream);
  }

  std::shared_ptr<Stream> take(int64_t number) {
    std::shared_ptr<Stream> stream = get(number);
    const std::lock_guard lock(mutex_);
    open_.erase(number);
    return stream;
  }

 private:
  std::map<int64_t, std::shared_ptr<Stream>> open_;
  std::mutex mutex_;
};

Streams& streams() {
  static auto* all = new Streams;  // outlives what the process destroys at its end: NCCL may be gone by then
  return *all;
}

void* check_vector(const Tensor& t, const char* name, int64_t numel, ScalarType dtype, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 1 && t.numel() == numel && t.is_contiguous(), name, " must be a contiguous vector of ",
                  numel, " elements, got ", t.numel());
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype: see cs336.ops.sharded_adamw_step_");
  check_device(t, name, x);
  void* data = data_of(t);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0 || numel < kShardAlign, name,
                  " must begin at a multiple of 16 bytes");
  return data;
}

// One element, or more, beside x; a view of others may begin anywhere.
float* check_floats(const Tensor& t, const char* name, int64_t numel, const Tensor& x) {
  STD_TORCH_CHECK(t.numel() == numel && t.is_contiguous() && t.scalar_type() == ScalarType::Float, name, " must be ",
                  numel, " contiguous float32 elements, got ", t.numel());
  check_device(t, name, x);
  return static_cast<float*>(data_of(t));
}

double* check_doubles(const Tensor& t, const char* name, int64_t numel, const Tensor& x) {
  STD_TORCH_CHECK(t.numel() == numel && t.is_contiguous() && t.scalar_type() == ScalarType::Double, name, " must be ",
                  numel, " contiguous float64 elements, got ", t.numel());
  check_device(t, name, x);
  return static_cast<double*>(data_of(t));
}

// Elements of a shard of the bucket.
int64_t check_bucket(const Tensor& t, const char* name, const Stream& stream) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  STD_TORCH_CHECK(t.get_device_index() == stream.device(), name,
                  " must be on the communicator's device, cuda:", stream.device(),
                  ", and is on cuda:", t.get_device_index());
  check_vector(t, name, t.numel(), dtype, t);
  STD_TORCH_CHECK(t.numel() > 0 && t.numel() % (stream.size() * kShardAlign) == 0, name, " must have a multiple of ",
                  stream.size(), " ranks x ", kShardAlign, " elements, above 0, got ", t.numel());
  return t.numel() / stream.size();
}

void reduce(const Tensor& grad, const Tensor& squares, int64_t comm) {
  const auto stream = streams().get(comm);
  const int64_t shard = check_bucket(grad, "grad", *stream);
  double* sums = check_doubles(squares, "squares", cuda::kSquares, grad);
  torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  stream->reduce(grad.mutable_data_ptr(), shard, dtype_of(grad, "grad"), sums, current_stream(grad));
}

void total(const Tensor& totals, const Tensor& squares, int64_t comm) {
  const auto stream = streams().get(comm);
  STD_TORCH_CHECK(totals.get_device_index() == stream->device(), "totals must be on the communicator's device");
  STD_TORCH_CHECK(totals.numel() > 0, "totals must have an element for the squares, got none");
  float* sums = check_floats(totals, "totals", totals.numel(), totals);
  const double* parts = check_doubles(squares, "squares", squares.numel(), totals);
  torch::stable::accelerator::DeviceGuard guard(totals.get_device_index());
  stream->total(sums, totals.numel(), parts, squares.numel(), current_stream(totals));
}

void step(const Tensor& param, const Tensor& grad, const std::optional<Tensor>& remainder, const Tensor& exp_avg,
          const Tensor& exp_avg_sq, const Tensor& steps, const Tensor& used, const std::vector<int64_t>& numels,
          const Tensor& lr, const std::optional<Tensor>& grad_scale, double beta1, double beta2, double eps,
          double weight_decay, int64_t comm) {
  const auto stream = streams().get(comm);
  const int64_t shard = check_bucket(param, "param", *stream), count = static_cast<int64_t>(numels.size());
  const ScalarType dtype = param.scalar_type();
  STD_TORCH_CHECK(!remainder || dtype == ScalarType::BFloat16, "remainder must be None where param is not bfloat16");
  STD_TORCH_CHECK(eps >= 0 && weight_decay >= 0, "eps and weight_decay must not be negative");
  STD_TORCH_CHECK(0 <= beta1 && beta1 < 1 && 0 <= beta2 && beta2 < 1, "beta1 and beta2 must be in [0, 1)");
  int64_t sum = 0;
  for (const int64_t numel : numels) {
    STD_TORCH_CHECK(numel >= 0 && numel % kShardAlign == 0 && numel <= param.numel() - sum,
                    "numels must be multiples of ", kShardAlign, " whose sum is at most ", param.numel());
    sum += numel;
  }
  const std::vector<Piece> pieces = pieces_of(numels, stream->rank() * shard, shard);
  const Dtype kind = dtype_of(param, "param");
  void* g = check_vector(grad, "grad", param.numel(), dtype, param);
  const cuda::ShardedAdamwParams p = {
      .p = stream->own_of(param.mutable_data_ptr(), shard, kind),
      .g = stream->own_of(g, shard, kind),
      .remainder = remainder
                       ? static_cast<int16_t*>(check_vector(*remainder, "remainder", shard, ScalarType::Short, param))
                       : nullptr,
      .m = static_cast<float*>(check_vector(exp_avg, "exp_avg", shard, ScalarType::Float, param)),
      .v = static_cast<float*>(check_vector(exp_avg_sq, "exp_avg_sq", shard, ScalarType::Float, param)),
      .steps = check_floats(steps, "steps", count, param),
      .used = check_floats(used, "used", count, param),
      .pieces = pieces,
      .dtype = kind};
  const AdamwHyper hyper = adamw_hyper(check_floats(lr, "lr", 1, param),
                                       grad_scale ? check_floats(*grad_scale, "grad_scale", 1, param) : nullptr, beta1,
                                       beta2, eps, weight_decay);
  torch::stable::accelerator::DeviceGuard guard(param.get_device_index());
  stream->step(param.mutable_data_ptr(), shard, p, hyper, current_stream(param));
}

void wait(const Tensor& param, int64_t comm) {
  const auto stream = streams().get(comm);
  check_bucket(param, "param", *stream);
  torch::stable::accelerator::DeviceGuard guard(param.get_device_index());
  stream->wait(param.const_data_ptr(), current_stream(param));
}

// null, or what f threw, until this thread's next call.
template <typename F>
const char* message_of(F&& f) {
  thread_local std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) {
  m.impl("sharded_adamw_reduce_", TORCH_BOX(&reduce));
  m.impl("sharded_adamw_total_", TORCH_BOX(&total));
  m.impl("sharded_adamw_step_", TORCH_BOX(&step));
  m.impl("sharded_adamw_wait_", TORCH_BOX(&wait));
}

}  // namespace cs336

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* cs336_nccl_missing() {
  return cs336::message_of([] { cs336::loaded_nccl(); });
}

EXPORT const char* cs336_nccl_unique_id(char* bytes) {
  return cs336::message_of([&] {
    cs336::NcclId id;
    const cs336::Nccl& nccl = cs336::loaded_nccl();
    nccl.check(nccl.get_unique_id(&id), "ncclGetUniqueId");
    std::memcpy(bytes, id.bytes, sizeof(id.bytes));
  });
}

// With the other ranks, which it waits for.
EXPORT const char* cs336_nccl_connect(int64_t number, const char* bytes, int rank, int size, int device) {
  return cs336::message_of([&] {
    cs336::NcclId id;
    std::memcpy(id.bytes, bytes, sizeof(id.bytes));
    cs336::streams().put(number, std::make_shared<cs336::Stream>(cs336::loaded_nccl(), id, rank, size, device));
  });
}

EXPORT const char* cs336_nccl_close(int64_t number) {
  return cs336::message_of([&] { cs336::streams().take(number)->close(); });
}

EXPORT void* cs336_nccl_stream(int64_t number) {  // null for a number that is not open
  void* stream = nullptr;
  cs336::message_of([&] { stream = cs336::streams().get(number)->moving(); });
  return stream;
}
