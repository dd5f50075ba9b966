// torch.ops.cs336.sample on CUDA.
#include "ops/sample.h"

#include "kernels/sample.h"

namespace cs336 {
namespace {

void run(const SampleParams& p, const Tensor& logits) {
  STD_TORCH_CHECK(p.vocabulary <= kMaxVocabulary, "logits must have at most ", kMaxVocabulary, " tokens, got ",
                  p.vocabulary);
  torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  sample(p, current_stream(logits));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cs336, CUDA, m) { m.impl("sample", TORCH_BOX(&sample_op<run>)); }

}  // namespace cs336
