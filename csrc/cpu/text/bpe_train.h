// Byte-level BPE training: pairs counted once, then kept up to date merge by merge (Sennrich et al. 2016).
#pragma once
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "cpu/text/word_count.h"

namespace cs336::text {

// The merges in order, as pairs of tokens: 0..255 are the bytes, 256 + i is the result of merge i. Each is the most
// frequent pair of its time; of equally frequent ones the greatest, left bytes first. Fewer than `num_merges` if no
// pair is left. The counter is emptied, to make room. progress(merges so far) is called now and then, and may throw to
// stop.
//
// No token is made twice: what a stretch of text merges to, while no token crosses its ends, depends on its bytes
// alone.
std::vector<std::pair<uint32_t, uint32_t>> train_bpe(WordCounter& counter, size_t num_merges,
                                                     const std::function<void(size_t)>& progress);

}  // namespace cs336::text
