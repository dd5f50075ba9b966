// torch.ops.cs336.sample on CPU.
#include "cpu/sample.h"

#include <algorithm>

#include "ops/sample.h"

namespace cs336 {
namespace {

constexpr int64_t kGrain = 16384;  // logits worth a thread

void run(const SampleParams& p, const Tensor&) {
  torch::stable::parallel_for(0, p.rows, std::max<int64_t>(1, kGrain / p.vocabulary),
                              [&](int64_t first, int64_t last) { cpu::sample(p, first, last); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CPU, m) { m.impl("sample", TORCH_BOX(&sample_op<run>)); }

}  // namespace cs336
