// Random booleans. bnrnn/kernels/philox.py has the definition and the reference.
#pragma once

#include <cstdint>

namespace bnrnn {

constexpr int64_t kBernoulliBlock = 1024;

// Draw elements begin..end of a mask; `begin` is a multiple of kBernoulliBlock. An element is true
// if its half word is below the threshold.
void bernoulli(uint64_t key, uint32_t stream, uint32_t threshold, int64_t begin, int64_t end,
               uint8_t* to);

}  // namespace bnrnn
