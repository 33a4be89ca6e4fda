#include "philox.h"

namespace bnrnn {
namespace {

// The number of four-word blocks processed together. It is large enough that the compiler
// vectorises the loops over them instead of unrolling them.
constexpr int kTogether = kBernoulliBlock / 8;

void draw(uint64_t key, uint32_t stream, uint64_t first, uint32_t (&word)[4][kTogether]) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int i = 0; i < kTogether; ++i) {
    const uint64_t block = first + i;
    word[0][i] = static_cast<uint32_t>(block), word[1][i] = static_cast<uint32_t>(block >> 32);
    word[2][i] = stream, word[3][i] = 0;
  }
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < kTogether; ++i) {
      const uint64_t of_a = uint64_t{0xD2511F53u} * word[0][i];
      const uint64_t of_c = uint64_t{0xCD9E8D57u} * word[2][i];
      word[0][i] = static_cast<uint32_t>(of_c >> 32) ^ word[1][i] ^ k0;
      word[1][i] = static_cast<uint32_t>(of_c);
      word[2][i] = static_cast<uint32_t>(of_a >> 32) ^ word[3][i] ^ k1;
      word[3][i] = static_cast<uint32_t>(of_a);
    }
  }
}

}  // namespace

void bernoulli(uint64_t key, uint32_t stream, uint32_t threshold, int64_t begin, int64_t end,
               uint8_t* to) {
  for (int64_t i = begin; i < end; i += kBernoulliBlock) {
    uint32_t word[4][kTogether];
    uint8_t found[kBernoulliBlock];
    draw(key, stream, static_cast<uint64_t>(i / 8), word);
    for (int k = 0; k < kTogether; ++k) {
      for (int w = 0; w < 4; ++w) {
        found[8 * k + 2 * w] = (word[w][k] & 0xFFFFu) < threshold;
        found[8 * k + 2 * w + 1] = (word[w][k] >> 16) < threshold;
      }
    }
    const int64_t n = end - i < kBernoulliBlock ? end - i : kBernoulliBlock;
    for (int64_t k = 0; k < n; ++k) to[i + k] = found[k];
  }
}

}  // namespace bnrnn
