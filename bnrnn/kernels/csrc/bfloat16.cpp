#include "bfloat16.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

// Only these functions may use the processor's bfloat16 instructions, once it is known to have
// them.
#if defined(__AVX512F__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define BNRNN_HAS_HALF 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define BNRNN_AVX512_BF16 __attribute__((target("avx512bf16")))
#define BNRNN_AMX __attribute__((target("amx-tile,amx-bf16")))
#endif

namespace bnrnn {
namespace {

enum class Way { kPortable, kAvx512, kAmx };
constexpr const char* kNames[] = {"portable", "avx512_bf16", "amx"};
constexpr int kTogether = 4;  // rows of a tile that are multiplied at once, in vectors

#if defined(BNRNN_HAS_HALF)

// Whether the system lets this process use the tile registers.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, xfeature numbers
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has(Way way) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  switch (way) {
    case Way::kAvx512: return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) != 0;
    case Way::kAmx: {
      const bool tiles_of_bf16 =
          __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) != 0 && (d >> 24 & 1) != 0;
      return tiles_of_bf16 && may_use_tiles();
    }
    default: return true;
  }
}

// Intel's processors need longer for VDPBF16PS than for the two multiply-adds it replaces: on an
// Emerald Rapids, a step of the reader took 1.8 times as long as in float.
bool avx512_is_fast() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
}

#else

bool has(Way way) { return way == Way::kPortable; }
bool avx512_is_fast() { return false; }

#endif

Way find_way() {
  const char* const wanted = std::getenv("BNRNN_KERNEL_BFLOAT16");
  for (const Way way : {Way::kPortable, Way::kAvx512, Way::kAmx}) {
    const char* const name = kNames[static_cast<int>(way)];
    if (wanted != nullptr && std::string_view(wanted) == name && has(way)) return way;
  }
  if (has(Way::kAmx)) return Way::kAmx;
  return has(Way::kAvx512) && avx512_is_fast() ? Way::kAvx512 : Way::kPortable;
}

Way way() {
  static const Way found = find_way();
  return found;
}

// One tile by N vectors of columns, whose first begins at c + column; vector n of the right operand
// is at right + n * stride.
template <int N>
void portable_tile(const Bf16Tile& tile, ptrdiff_t blocks, const Bf16* right, ptrdiff_t stride,
                   ptrdiff_t column, bool add) {
  constexpr int lanes = kLanes<float>;
  const auto words = [](const Bf16* at) {
    return (Integers<float>)load(reinterpret_cast<const float*>(at));
  };
  for (ptrdiff_t r = 0; r < tile.rows; ++r) {
    Vector<float> sums[N];
    float* const c = tile.c + r * tile.stride + column;
    for (int n = 0; n < N; ++n) sums[n] = add ? load(c + n * lanes) : zero<float>();
    for (ptrdiff_t k = 0; k < blocks * kBf16Depth; k += 2) {
      const Bf16* const left =
          tile.left + k / kBf16Depth * kBf16Block + r * kBf16Depth + k % kBf16Depth;
      const auto first = (Vector<float>)(Integers<float>{} + (left[0] << 16));
      const auto second = (Vector<float>)(Integers<float>{} + (left[1] << 16));
      for (int n = 0; n < N; ++n) {
        const Integers<float> pair = words(right + n * stride + k * lanes);
        sums[n] += first * (Vector<float>)(pair << 16);
        sums[n] += second * (Vector<float>)(pair & ~0xffff);
      }
    }
    for (int n = 0; n < N; ++n) store(c + n * lanes, sums[n]);
  }
}

#if defined(BNRNN_HAS_HALF)

template <int N>
BNRNN_AVX512_BF16 void avx512_tile(const Bf16Tile& tile, ptrdiff_t blocks, const Bf16* right,
                                   ptrdiff_t stride, ptrdiff_t column, bool add) {
  for (ptrdiff_t r0 = 0; r0 < tile.rows; r0 += kTogether) {
    const ptrdiff_t rows = std::min<ptrdiff_t>(kTogether, tile.rows - r0);
    float* const c = tile.c + r0 * tile.stride + column;
    __m512 sums[kTogether][N];
#pragma GCC unroll 4
    for (int r = 0; r < kTogether; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        sums[r][n] =
            add && r < rows ? _mm512_loadu_ps(c + r * tile.stride + n * 16) : _mm512_setzero_ps();
      }
    }
    const Bf16* left = tile.left + r0 * kBf16Depth;
    for (ptrdiff_t block = 0; block < blocks; ++block, left += kBf16Block) {
      for (ptrdiff_t k = 0; k < kBf16Depth; k += 2) {
        __m512bh pairs[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          pairs[n] =
              (__m512bh)_mm512_loadu_si512(right + n * stride + (block * kBf16Depth + k) * 16);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kTogether; ++r) {
          int32_t word;
          std::memcpy(&word, left + r * kBf16Depth + k, sizeof word);
          const auto of_row = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], of_row, pairs[n]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTogether; ++r) {
      if (r >= rows) break;
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + r * tile.stride + n * 16, sums[r][n]);
    }
  }
}

// R tiles by N vectors of columns, in the processor's tile registers: the results in 0 to 3, two
// left operands in 4 and 5, two right operands in 6 and 7.
template <int R, int N>
BNRNN_AMX void amx_tiles(const Bf16Tile* tiles, ptrdiff_t blocks, const Bf16* right,
                         ptrdiff_t stride, ptrdiff_t column, bool add) {
  constexpr int kLine = 64;  // bytes of a row of an operand
  constexpr ptrdiff_t kBlocksAhead = 4;
  alignas(64) float partial[R][16][16 * N];  // of a tile with fewer than 16 rows
  float* c[R];
  ptrdiff_t row[R];  // bytes between rows
  for (int r = 0; r < R; ++r) {
    const Bf16Tile& tile = tiles[r];
    c[r] = tile.c + column, row[r] = tile.stride * 4;
    if (tile.rows == kBf16Rows) continue;
    for (ptrdiff_t i = 0; add && i < tile.rows; ++i) {
      std::copy_n(c[r] + i * tile.stride, 16 * N, partial[r][i]);
    }
    c[r] = partial[r][0], row[r] = sizeof partial[r][0];
  }
  // The tiles' rows are too far apart for the processor to recognise the pattern. Fetch those of
  // this result if they are only written, and else those of the next one.
  const ptrdiff_t ahead = add ? 16 * N : 0;
  for (int r = 0; r < R; ++r) {
    for (ptrdiff_t i = 0; i < tiles[r].rows; ++i) {
      prefetch<true>(tiles[r].c + column + ahead + i * tiles[r].stride, 16 * N);
    }
  }
  if (add) {
    _tile_loadd(0, c[0], row[0]);
    if constexpr (N == 2) _tile_loadd(1, c[0] + 16, row[0]);
    if constexpr (R == 2) _tile_loadd(2, c[1], row[1]);
    if constexpr (R == 2 && N == 2) _tile_loadd(3, c[1] + 16, row[1]);
  } else {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && N == 2) _tile_zero(3);
  }
  for (ptrdiff_t k = 0; k < blocks * kBf16Block; k += kBf16Block) {
    if (column == 0) {  // later columns find the left operands in the second-level cache
      for (int r = 0; r < R; ++r) {
        prefetch<false>(tiles[r].left + k + kBlocksAhead * kBf16Block, kBf16Block);
      }
    }
    _tile_loadd(4, tiles[0].left + k, kLine);
    _tile_loadd(6, right + k, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, right + stride + k, kLine);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, tiles[1].left + k, kLine);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c[0], row[0]);
  if constexpr (N == 2) _tile_stored(1, c[0] + 16, row[0]);
  if constexpr (R == 2) _tile_stored(2, c[1], row[1]);
  if constexpr (R == 2 && N == 2) _tile_stored(3, c[1] + 16, row[1]);
  for (int r = 0; r < R; ++r) {
    const Bf16Tile& tile = tiles[r];
    if (tile.rows == kBf16Rows) continue;
    for (ptrdiff_t i = 0; i < tile.rows; ++i) {
      std::copy_n(partial[r][i], 16 * N, tile.c + i * tile.stride + column);
    }
  }
}

// Eight tile registers of 16 rows of 64 bytes.
BNRNN_AMX void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  _tile_loadconfig(&configuration);
}

BNRNN_AMX void release_tiles() { _tile_release(); }

#else

void configure_tiles() {}
void release_tiles() {}

#endif

}  // namespace

void bf16_product(const Bf16Tile* tiles, ptrdiff_t count, ptrdiff_t blocks, const Bf16* right,
                  ptrdiff_t right_blocks, ptrdiff_t vectors, bool add) {
  constexpr ptrdiff_t lanes = kLanes<float>;
  const ptrdiff_t stride = right_blocks * kBf16Depth * lanes;
#if defined(BNRNN_HAS_HALF)
  if (way() == Way::kAmx) {
    for (ptrdiff_t i = 0; i < count; i += 2) {
      for (ptrdiff_t v = 0; v < vectors; v += 2) {
        const bool two_tiles = i + 1 < count, two_vectors = v + 1 < vectors;
        const auto run = two_tiles ? (two_vectors ? amx_tiles<2, 2> : amx_tiles<2, 1>)
                                   : (two_vectors ? amx_tiles<1, 2> : amx_tiles<1, 1>);
        run(tiles + i, blocks, right + v * stride, stride, v * lanes, add);
      }
    }
    return;
  }
#endif
  const auto run_of = [](ptrdiff_t n) {
#if defined(BNRNN_HAS_HALF)
    if (way() == Way::kAvx512) {
      return n == 4   ? avx512_tile<4>
             : n == 3 ? avx512_tile<3>
             : n == 2 ? avx512_tile<2>
                      : avx512_tile<1>;
    }
#endif
    return n == 4   ? portable_tile<4>
           : n == 3 ? portable_tile<3>
           : n == 2 ? portable_tile<2>
                    : portable_tile<1>;
  };
  for (ptrdiff_t i = 0; i < count; ++i) {
    for (ptrdiff_t v = 0; v < vectors; v += 4) {
      const auto run = run_of(std::min<ptrdiff_t>(4, vectors - v));
      run(tiles[i], blocks, right + v * stride, stride, v * lanes, add);
    }
  }
}

const char* bf16_way() { return kNames[static_cast<int>(way())]; }

Bf16Products::Bf16Products(bool wanted) : configured(wanted && way() == Way::kAmx) {
  if (configured) configure_tiles();
}

Bf16Products::~Bf16Products() {
  if (configured) release_tiles();
}

}  // namespace bnrnn
