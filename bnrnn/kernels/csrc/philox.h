// Random booleans: bnrnn/kernels/philox.py has the source and the definition.
#pragma once

#include <cstdint>

namespace bnrnn {

constexpr int64_t kBernoulliBlock = 1024;

// Numbers begin..end of a mask; `begin` is a multiple of kBernoulliBlock. True where half a word is below the threshold.
void bernoulli(uint64_t key, uint32_t stream, uint32_t threshold, int64_t begin, int64_t end,
               uint8_t* to);

}  // namespace bnrnn
