// Asks the norms' launch plans about every shape, and fails with the first that breaks a rule. Run by
// test_norm_plan.py.
#include "kernels/norm_plan.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

using namespace cs336;
using namespace cs336::cuda;

namespace {

constexpr Device kH200{
    .index = 0, .num_sms = 132, .registers = 65536, .max_shared_bytes = 232448, .has_clusters = true};
constexpr Device kA100{
    .index = 0, .num_sms = 108, .registers = 65536, .max_shared_bytes = 166912, .has_clusters = false};
constexpr Device kSmall{
    .index = 0, .num_sms = 20, .registers = 65536, .max_shared_bytes = 101376, .has_clusters = false};

#define CHECK(condition)                                                                                \
  do {                                                                                                  \
    if (!(condition)) {                                                                                 \
      std::printf("%s: M %lld N %lld size %d centred %d added %d sms %d\n", #condition, (long long)s.M, \
                  (long long)s.N, s.element_size, s.centred, s.added, device.num_sms);                  \
      std::exit(1);                                                                                     \
    }                                                                                                   \
  } while (0)

bool same_rows(const RowLayout& a, const RowLayout& b) {  // all that orders the sum of a row
  return a.vecs == b.vecs && a.lanes == b.lanes && a.cluster == b.cluster;
}

void check_layout(const NormShape& s, const RowLayout& layout, int max_threads, const Device& device) {
  CHECK(layout.threads <= max_threads && layout.threads % layout.lanes == 0);
  CHECK(layout.lanes <= 32 ? layout.lanes == 1 << layout.log2_lanes : layout.lanes % 32 == 0);
  CHECK(layout.cluster == 1 ||
        (device.has_clusters && layout.cluster <= kMaxCluster && layout.threads == layout.lanes));
  CHECK(int64_t{layout.vecs} * layout.lanes * layout.cluster * 16 >= s.N * s.element_size);  // the row fits
  CHECK(layout.blocks > 0 || s.M == 0);
  CHECK(layout.blocks % layout.cluster == 0);
}

void check_fwd(const NormShape& s, const Device& device) {
  const FwdPlan plan = plan_fwd(s, true, true, device), elements = plan_fwd(s, false, true, device);
  CHECK(same_rows(plan.layout, elements.layout) && plan.span == elements.span && !elements.hold);  // wherever rows lie
  NormShape one = s;
  one.M = 1;
  CHECK(same_rows(plan.layout, fwd_layout(one, device)));  // and however many they are
  if (plan.layout.vecs == 0) return;
  check_layout(s, plan.layout, kMaxFwdThreads, device);
  CHECK(int64_t{plan.layout.blocks} / plan.layout.cluster * plan.layout.rows_per_block() >= s.M);
  CHECK(has_fwd_kernel(plan.layout.vecs, plan.span, s.added, s.centred));
  const int registers = max_fwd_registers(plan.layout.vecs, s.added, s.centred, plan.hold);
  CHECK(plan.layout.threads * registers <= device.registers);  // a block must fit a multiprocessor
  CHECK(!plan_fwd(s, true, false, device).hold);  // float32 features of 16-bit rows do not fit the held vectors
}

void check_bwd(const NormShape& s, const Device& device) {
  const BwdPlan plan = plan_bwd(s, true, device), any = plan_bwd(s, false, device);
  CHECK(any.layout.vecs == 0 && (any.num_partials > 0) == (s.M > 0));
  CHECK(bwd_workspace(s, plan) >= plan.num_partials * s.N * (s.centred ? 2 : 1));
  CHECK(row_pitch(s.N) % 4 == 0 && row_pitch(s.N) >= s.N);
  if (plan.layout.vecs == 0 || s.M == 0) return;
  check_layout(s, plan.layout, kMaxBwdThreads, device);
  const int elements = plan.layout.vecs * 16 / s.element_size, num_streams = s.added ? 3 : 2;
  CHECK(elements == 16 || (elements == 32 && plan.span == Span::kBlock));
  CHECK(plan.span != Span::kBlock || plan.layout.rows_per_block() == 1);
  CHECK(plan.span != Span::kWarps || plan.layout.rows_per_block() <= 16);  // of the 16 named barriers
  CHECK(plan.stages == num_stages(plan.layout.vecs) || (plan.stages == 1 && plan.span == Span::kLanes));
  const int ring = ring_bytes_per_thread(plan.layout.vecs, plan.stages, num_streams) * plan.layout.threads;
  CHECK(ring + 4096 <= device.max_shared_bytes);
  const int parts = plan.span == Span::kLanes ? plan.layout.threads / 32 : plan.layout.rows_per_block();
  CHECK(parts == 1 || parts * row_pitch(s.N) * 4 <= ring);  // where the parts of a block are added up
  CHECK(plan.num_partials == plan.layout.blocks / plan.layout.cluster && plan.num_partials <= s.M);
}

}  // namespace

int main() {
  for (const Device& device : {kH200, kA100, kSmall})
    for (int size : {2, 4})
      for (bool centred : {false, true})
        for (bool added : {false, true})
          for (int64_t M : {0, 1, 2, 7, 300, 4096, 70001, 1 << 24})
            for (int64_t N = 1; N <= 300000; N += N < 5000 ? 1 : N % 8 == 0 ? 1003 : 8 - N % 8) {
              const NormShape s{M, N, size, centred, added};
              check_fwd(s, device);
              check_bwd(s, device);
            }
  const NormShape huge{int64_t{1} << 30, 8, 2, false, false};
  if (fwd_layout(huge, kH200).vecs != 0) return std::puts("a row's number must fit an int"), 1;
  return 0;
}
