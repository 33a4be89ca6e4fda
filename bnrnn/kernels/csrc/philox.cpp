#include "philox.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace bnrnn {
namespace {

typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 2)));
constexpr int kBlocks = kVectorBytes / 8;  // one in each lane
constexpr int kRounds = 10, kHalvesOfBlock = 8;

struct Keys {
  uint64_t a[kRounds], c[kRounds];

  explicit Keys(uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < kRounds; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      a[round] = k0, c[round] = k1;
    }
  }
};

// The product of the lower half of each lane with a number.
BNRNN_INLINE Words product(Words a, uint32_t b) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// Draw the four words of each block, one block after another.
BNRNN_INLINE void draw(const Keys& keys, uint32_t stream, Words block, uint64_t* to) {
  // Only the lower halves of the lanes matter.
  Words a = block, b = block >> 32, c = Words{} + stream, d = {};
#pragma GCC unroll 10
  for (int round = 0; round < kRounds; ++round) {
    const Words of_a = product(a, 0xD2511F53u), of_c = product(c, 0xCD9E8D57u);
    a = (of_c >> 32) ^ b ^ keys.a[round];
    b = of_c;
    c = (of_a >> 32) ^ d ^ keys.c[round];
    d = of_a;
  }
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  const auto ab = (Vector<double>)((a & kLow) | (b << 32));
  const auto cd = (Vector<double>)((c & kLow) | (d << 32));
  const auto put = [&](uint64_t* row, int from) {
    const Vector<double> mixed =
        permuted<double>(ab, cd, [from](int i) { return i % 2 * kBlocks + from + i / 2; });
    std::memcpy(row, &mixed, sizeof mixed);
  };
  put(to, 0), put(to + kBlocks, kBlocks / 2);
}

}  // namespace

void bernoulli(uint64_t key, uint32_t stream, uint32_t threshold, int64_t begin, int64_t end,
               uint8_t* to) {
  const Keys keys(key);
  const auto limit = static_cast<uint16_t>(threshold);
  const uint8_t always = threshold > 0xFFFF;
  Words block;
  for (int i = 0; i < kBlocks; ++i) block[i] = static_cast<uint64_t>(begin / kHalvesOfBlock + i);
  for (int64_t i = begin; i < end; i += kBernoulliBlock) {
    uint64_t words[kBernoulliBlock / 4];
    for (int k = 0; k < kBernoulliBlock / 4; k += 2 * kBlocks, block += kBlocks) {
      draw(keys, stream, block, words + k);
    }
    uint8_t found[kBernoulliBlock];
    for (int k = 0; k < kBernoulliBlock; k += kVectorBytes / 2) {
      Halves half;
      std::memcpy(&half, words + k / 4, sizeof half);
      const Bytes below = __builtin_convertvector((Halves)(half < limit) & 1, Bytes) | always;
      std::memcpy(found + k, &below, sizeof below);
    }
    std::memcpy(to + i, found, std::min(end - i, kBernoulliBlock));
  }
}

}  // namespace bnrnn
