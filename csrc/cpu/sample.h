// Sampling of next tokens on the CPU. A row's draw does not depend on how the rows are cut into ranges.
#pragma once
#include <cstdint>

#include "common/sample_params.h"

namespace cs336::cpu {

void sample(const SampleParams& p, int64_t first_row, int64_t last_row);

}  // namespace cs336::cpu
