// Queues training steps on streams that only write down what touches which memory, and fails where two accesses that
// conflict are not ordered by events, or where things are ordered that shall overlap. Run by
// test_sharded_adamw_native.py; what a caller has to do is in `train`, and `main` leaves parts of it out.
#include "kernels/sharded_adamw_stream.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

using namespace cs336;
using namespace cs336::cuda;

// ---- a CUDA that remembers: a stream's clock says up to which access of each stream it is after ----

using Clock = std::map<const void*, int>;

struct CUstream_st {
  Clock clock;
};
struct CUevent_st {
  Clock clock;
};

namespace {

struct Access {
  std::string name;
  cudaStream_t stream;
  int time;
  const char *begin, *end;
  bool writes;
  Clock clock;  // of what is before it
};
std::vector<Access> accesses;
std::vector<std::string> races;
int live = 0;        // streams, events and communicators
int creations = -1;  // of streams and events, until one fails; below 0 none does

bool is_before(const Access& a, const Access& b) {
  const auto found = b.clock.find(a.stream);
  return found != b.clock.end() && found->second >= a.time;
}

void touch(const std::string& name, cudaStream_t stream, const void* data, size_t bytes, bool writes) {
  const auto* begin = static_cast<const char*>(data);
  Access now{name, stream, stream->clock[stream] + 1, begin, begin + bytes, writes, stream->clock};
  for (const Access& other : accesses)
    if ((other.writes || writes) && other.begin < now.end && now.begin < other.end && !is_before(other, now))
      races.push_back(other.name + " and " + name);
  accesses.push_back(now);
}

void tick(cudaStream_t stream) { stream->clock[stream]++; }  // one queued thing is all its touches

void merge(Clock& into, const Clock& from) {
  for (const auto& [stream, time] : from) into[stream] = std::max(into[stream], time);
}

// The last access of that name, or the one before so many others.
const Access& last(const std::string& name, int before = 0) {
  for (size_t i = accesses.size(); i-- > 0;)
    if (accesses[i].name == name && before-- == 0) return accesses[i];
  std::printf("nothing is called %s\n", name.c_str());
  std::exit(1);
}

}  // namespace

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  if (priority != -5) races.push_back("a stream of low priority");
  if (creations-- == 0) return cudaErrorMemoryAllocation;
  return live++, *stream = new CUstream_st, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return live--, delete stream, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (creations-- == 0) return cudaErrorMemoryAllocation;
  return live++, *event = new CUevent_st, cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return event->clock = stream->clock, cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return merge(stream->clock, event->clock), cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return live--, delete event, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// ---- NCCL, and the kernels ----

namespace {

size_t bytes_of(NcclType type) { return type == NcclType::kFloat32 ? 4 : 2; }
constexpr int kSize = 3, kRank = 1;

const Nccl kNccl = {
    .get_version = nullptr,
    .get_unique_id = nullptr,
    .comm_init_rank = [](NcclComm* comm, int, NcclId, int) { return live++, *comm = comm, 0; },
    .comm_destroy = [](NcclComm) { return live--, 0; },
    .reduce_scatter =
        [](const void* in, void* out, size_t count, NcclType type, NcclSum, NcclComm, cudaStream_t stream) {
          if (out != static_cast<const char*>(in) + kRank * count * bytes_of(type)) races.push_back("out of place");
          touch("reduce", stream, in, kSize * count * bytes_of(type), true);
          return tick(stream), 0;
        },
    .all_gather =
        [](const void* in, void* out, size_t count, NcclType type, NcclComm, cudaStream_t stream) {
          if (in != static_cast<char*>(out) + kRank * count * bytes_of(type)) races.push_back("out of place");
          touch("gather", stream, out, kSize * count * bytes_of(type), true);
          return tick(stream), 0;
        },
    .all_reduce =
        [](const void*, void* out, size_t count, NcclType, NcclSum, NcclComm, cudaStream_t stream) {
          touch("all_reduce", stream, out, count * 4, true);
          return tick(stream), 0;
        },
    .get_error_string = [](int) { return "an error"; },
};

}  // namespace

namespace cs336::cuda {

void sum_squares(const void* x, int64_t numel, Dtype dtype, double* squares, cudaStream_t stream) {
  touch("squares", stream, x, numel * size_of(dtype), false);
  touch("squares", stream, squares, kSquares * sizeof(double), true);
  tick(stream);
}

void sum_partials(const double* x, int64_t numel, float* total, cudaStream_t stream) {
  touch("partials", stream, x, numel * sizeof(double), false);
  touch("partials", stream, total, 4, true);
  tick(stream);
}

void sharded_adamw(const ShardedAdamwParams& p, const AdamwHyper& hyper, cudaStream_t stream) {
  const int64_t numel = p.pieces.back().end;
  touch("adamw", stream, p.p, numel * size_of(p.dtype), true);
  touch("adamw", stream, p.g, numel * size_of(p.dtype), false);
  touch("adamw", stream, p.m, numel * 4, true);
  touch("adamw", stream, p.used, 4, false);
  touch("adamw", stream, hyper.grad_scale, 4, false);
  tick(stream);
}

}  // namespace cs336::cuda

// ---- what a caller does ----

namespace {

constexpr int kBuckets = 3, kSteps = 3;
constexpr int64_t kShard = 32;

struct Mistakes {
  bool no_wait = false, no_total = false, touches_gradients = false;
};

// The races that the steps have.
std::vector<std::string> train(Dtype dtype, const Mistakes& mistakes) {
  accesses.clear();
  races.clear();
  const int64_t bytes = kSize * kShard * size_of(dtype);
  std::vector<std::vector<char>> params(kBuckets, std::vector<char>(bytes)), grads = params;
  std::vector<std::vector<float>> moments(kBuckets, std::vector<float>(kShard));
  std::vector<double> squares(kBuckets * kSquares);
  std::vector<float> totals(1 + kBuckets), scale(1);
  CUstream_st current;
  ShardedAdamwStream stream(kNccl, NcclId{}, kRank, kSize, 0);
  for (int step = 0; step < kSteps; step++) {
    for (int b = kBuckets; b-- > 0;) {  // the last bucket has the first layers
      if (!mistakes.no_wait) stream.wait(params[b].data(), &current);
      touch("forward " + std::to_string(b), &current, params[b].data(), bytes, false);
      tick(&current);
    }
    for (int b = 0; b < kBuckets; b++) {
      touch("backward " + std::to_string(b), &current, params[b].data(), bytes, false);
      touch("backward " + std::to_string(b), &current, grads[b].data(), bytes, true);
      tick(&current);
      stream.reduce(grads[b].data(), kShard, dtype, &squares[b * kSquares], &current);
      if (mistakes.touches_gradients) touch("user", &current, grads[b].data(), 1, false);
      tick(&current);
    }
    touch("used", &current, &totals[1], kBuckets * 4, true);
    tick(&current);
    if (!mistakes.no_total) stream.total(totals.data(), totals.size(), squares.data(), squares.size(), &current);
    touch("clip", &current, totals.data(), 4, false);
    touch("clip", &current, scale.data(), 4, true);
    tick(&current);
    for (int b = kBuckets; b-- > 0;) {
      const Piece piece{.begin = 0, .end = kShard, .parameter = 0};
      const ShardedAdamwParams p{.p = stream.own_of(params[b].data(), kShard, dtype),
                                 .g = stream.own_of(grads[b].data(), kShard, dtype),
                                 .remainder = nullptr,
                                 .m = moments[b].data(),
                                 .v = moments[b].data(),
                                 .steps = nullptr,
                                 .used = &totals[1 + b],
                                 .pieces = {&piece, 1},
                                 .dtype = dtype};
      AdamwHyper hyper{};
      hyper.grad_scale = scale.data();
      stream.step(params[b].data(), kShard, p, hyper, &current);
    }
  }
  const auto found = races;
  stream.wait(params[kBuckets - 1].data(), &current);
  touch("after", &current, params[kBuckets - 1].data(), bytes, false);
  tick(&current);
  const Access last_gather = last("gather"), gather_before = last("gather", 1), first_sum = last("reduce", 2);
  if (is_before(last_gather, last("after"))) races.push_back("the first layers wait for the last layers' gather");
  if (is_before(gather_before, last("adamw"))) races.push_back("AdamW waits for the gather of the bucket before it");
  if (is_before(first_sum, last("backward 2"))) races.push_back("the backward waits for its own sums");
  if (races.size() != found.size()) {
    std::printf("%s\n", races.back().c_str());
    std::exit(1);
  }
  const cudaStream_t moving = stream.moving();
  stream.close();
  if (live != 1) std::printf("%d events or communicators are left\n", live - 1), std::exit(1);
  CUevent_st freed;  // torch's allocator, when the buckets go
  cudaEventRecord(&freed, moving);
  if (freed.clock[moving] < last("gather").time) std::printf("the stream is gone\n"), std::exit(1);
  cudaStreamDestroy(moving);
  return found;
}

void expect(const char* what, bool clean, const Mistakes& mistakes) {
  for (const Dtype dtype : {Dtype::F32, Dtype::BF16}) {
    const auto found = train(dtype, mistakes);
    if (found.empty() == clean) continue;
    std::printf("%s: %s\n", what, found.empty() ? "no race was found" : found.front().c_str());
    std::exit(1);
  }
}

// Nothing is left of one that could not be made.
void fail_at(int creation) {
  creations = creation;
  try {
    const ShardedAdamwStream stream(kNccl, NcclId{}, kRank, kSize, 0);
    std::printf("creation %d did not fail\n", creation), std::exit(1);
  } catch (const std::runtime_error&) {
  }
  if (live != 0) std::printf("%d are left where creation %d failed\n", live, creation), std::exit(1);
  creations = -1;
}

}  // namespace

int main() {
  for (int creation = 0; creation < 3; creation++) fail_at(creation);
  expect("steps as they shall be", true, {});
  expect("a forward that does not wait for its bucket", false, {.no_wait = true});
  expect("a step without clipping", true, {.no_total = true});
  expect("a user who reads gradients on their way", false, {.touches_gradients = true});
}
