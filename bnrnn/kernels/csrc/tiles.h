// Products of tiles: some rows by up to kTileVectors vectors, held in registers.
//
// Each element is the sum over k in ascending order, one fused multiply-add at a time, regardless
// of its tile. In the tail of a batch it is the sum of up to kRun such sums, see tail_product.
// Results therefore do not depend on how the work is split among threads.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace bnrnn {

// Tiles over up to kDepth of k use the same panel of the right operand, kDepth by kTileVectors
// vectors.
#if defined(__AVX512F__)
constexpr int kTileVectors = 4, kTileRows = 6;  // 24 of 32 registers are accumulators
// Of tiles with fewer vectors, again 24: fewer tiles begin and end. Double precision, which is for
// checks, does without.
template <typename T>
constexpr int kTallRows = sizeof(T) == sizeof(float) ? 8 : kTileRows;
// Such a tile reads less than the second-level cache can supply, and its beginning and end take 90
// cycles. So few, deep tiles are best, whose panel (128 KiB) fits only that cache.
constexpr ptrdiff_t kDepth = 512;
#else
constexpr int kTileVectors = 3, kTileRows = 4;  // 12 of 16 registers
template <typename T>
constexpr int kTallRows = kTileRows;
constexpr ptrdiff_t kDepth = 256;  // the panel stays in the first-level cache
#endif

// The left operand of a product over a range of k. The elements of a row lie in runs of kRun k:
// element (r, k) of a tile is a[r * row + k / kRun * run + k % kRun]; `tile` elements further is
// that of the next tile.
constexpr int kRun = 4;
template <typename T>
struct Left {
  const T* a;
  ptrdiff_t row, tile, run, depth;
};

// A left operand whose rows are contiguous, at a distance of `row` elements.
template <typename T>
Left<T> contiguous_left(const T* a, ptrdiff_t row, ptrdiff_t depth, ptrdiff_t tile_rows) {
  return {a, row, tile_rows * row, kRun, depth};
}

// visit(a) for each k of a left operand, `a` being the place of element (0, k).
template <typename T, typename Visit>
BNRNN_INLINE void for_each_k(const Left<T>& left, Visit&& visit) {
  const T* a = left.a;
  ptrdiff_t k = 0;
  for (; k + kRun <= left.depth; k += kRun, a += left.run) {
#pragma GCC unroll 4
    for (int i = 0; i < kRun; ++i) visit(a + i);
  }
  for (; k < left.depth; ++k, ++a) visit(a);
}

// c[r][column...] (+)= the sum over the k of all left operands, one after another, from row `row`
// on; the vectors of row k of the right operand follow those of row k - 1. Meanwhile, fetch a
// vector per k, from `ahead` on, into the second-level cache.
template <typename T, int R, int N>
void tile_product(const Left<T>* lefts, ptrdiff_t count, ptrdiff_t row, const T* b, T* const* c,
                  ptrdiff_t column, bool add, const T* ahead) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      sums[r][n] = add ? load(c[r] + column + n * lanes) : zero<T>();
    }
  }
  if (!add) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) prefetch<true>(c[r] + column, N * lanes);
  }
  for (ptrdiff_t i = 0; i < count; ++i) {
    Left<T> left = lefts[i];
    left.a += row * left.row;
    for_each_k(left, [&](const T* a) {
      __builtin_prefetch(ahead, 0, 2);
      Vector<T> right[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) right[n] = load(b + n * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vector<T> of_row = broadcast(a[r * left.row]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[r][n] += of_row * right[n];
      }
      b += N * lanes, ahead += lanes;
    });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c[r] + column + n * lanes, sums[r][n]);
  }
}

// Two tiles of kTallRows rows by one vector. One tile alone has hardly as many sums as the
// processor can add to at a time.
template <typename T>
void tile_pair_product(const Left<T>& left, const T* b, T* const* c, ptrdiff_t column, bool add) {
  constexpr int kRows = kTallRows<T>;
  Vector<T> sums[2 * kRows];
#pragma GCC unroll 16
  for (int r = 0; r < 2 * kRows; ++r) sums[r] = add ? load(c[r] + column) : zero<T>();
  for_each_k(left, [&](const T* a) {
    const Vector<T> right = load(b);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r] += broadcast(a[r * left.row]) * right;
      sums[kRows + r] += broadcast(a[left.tile + r * left.row]) * right;
    }
    b += kLanes<T>;
  });
#pragma GCC unroll 16
  for (int r = 0; r < 2 * kRows; ++r) store(c[r] + column, sums[r]);
}

template <typename T>
using TileProduct = void (*)(const Left<T>*, ptrdiff_t, ptrdiff_t, const T*, T* const*, ptrdiff_t,
                             bool, const T*);

template <typename T, int R>
TileProduct<T> tile_of(int vectors) {
  if constexpr (kTileVectors >= 4 && R <= kTileRows) {
    if (vectors == 4) return tile_product<T, R, 4>;
  }
  if constexpr (kTileVectors >= 3) {
    if (vectors == 3) return tile_product<T, R, 3>;
  }
  return vectors == 2 ? tile_product<T, R, 2> : tile_product<T, R, 1>;
}

template <typename T>
TileProduct<T> tile_of(int rows, int vectors) {
  if constexpr (kTallRows<T> >= 8) {
    if (rows == 8) return tile_of<T, 8>(vectors);
    if (rows == 7) return tile_of<T, 7>(vectors);
  }
  if constexpr (kTileRows >= 6) {
    if (rows == 6) return tile_of<T, 6>(vectors);
    if (rows == 5) return tile_of<T, 5>(vectors);
  }
  switch (rows) {
    case 1: return tile_of<T, 1>(vectors);
    case 2: return tile_of<T, 2>(vectors);
    case 3: return tile_of<T, 3>(vectors);
    default: return tile_of<T, 4>(vectors);
  }
}

// kTiles tiles of left operands, of kTile rows each, from `row` on, times the tail of a right
// operand, kTogether of k at once: lane n of a sum has column n / kTogether, and of k those that
// leave the remainder n % kTogether. Only the first `rows` results are stored.
template <typename T, int kTogether, int kTile, int kTiles>
void tail_product(const Left<T>* lefts, ptrdiff_t count, ptrdiff_t row, const T* right, T* const* c,
                  ptrdiff_t column, ptrdiff_t rows, bool add) {
  constexpr int lanes = kLanes<T>, columns = lanes / kTogether, kRows = kTile * kTiles;
  Vector<T> sums[kRows] = {};
  for (ptrdiff_t i = 0; i < count; ++i) {
    const Left<T>& left = lefts[i];
    // Add the products of `count` k, from `a` on, with these rows of the right operand.
    const auto add_products = [&](const T* a, Vector<T> of_k, auto count) {
      const Vector<T> by_column = permuted<T>(
          of_k, of_k, [](int lane) { return lane % kTogether * columns + lane / kTogether; });
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const T* const of_row = a + r / kTile * left.tile + r % kTile * left.row;
        sums[r] += repeated<T, count>(of_row) * by_column;
      }
    };
    const T* a = left.a + row * left.row;
    ptrdiff_t rest = left.depth;
    for (; rest >= kRun; rest -= kRun, a += left.run) {
#pragma GCC unroll 2
      for (int k = 0; k < kRun; k += kTogether, right += lanes) {
        add_products(a + k, load(right), std::integral_constant<int, kTogether>());
      }
    }
    for (; rest > 0; --rest, ++a, right += columns) {
      add_products(a, load_first(right, columns), std::integral_constant<int, 1>());
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    Vector<T> total = pair_sums<T>(sums[r]);
    if (kTogether == 4) total = pair_sums<T>(total);
    store(c[r] + column, add ? load(c[r] + column) + total : total);
  }
}

template <typename T>
using TailProduct = void (*)(const Left<T>*, ptrdiff_t, ptrdiff_t, const T*, T* const*, ptrdiff_t,
                             ptrdiff_t, bool);

template <typename T, int kTile, int kTiles>
TailProduct<T> tail_product_of(int together) {
  if constexpr (kLanes<T> >= 4) {
    if (together == 4) return tail_product<T, 4, kTile, kTiles>;
  }
  return tail_product<T, 2, kTile, kTiles>;
}

// The tail_product of one or two tiles, or of one row, for `together`, which is 2 or 4.
template <typename T>
TailProduct<T> tail_product_of(int together, int tile_rows, int tiles) {
  if (tile_rows == 1) return tail_product_of<T, 1, 1>(together);
  if (tile_rows == kTileRows) {
    return tiles == 1 ? tail_product_of<T, kTileRows, 1>(together)
                      : tail_product_of<T, kTileRows, 2>(together);
  }
  return tiles == 1 ? tail_product_of<T, kTallRows<T>, 1>(together)
                    : tail_product_of<T, kTallRows<T>, 2>(together);
}

// products.cpp instantiates the tiles and the products once for all other files.
#define BNRNN_TILES(EXTERN, T)                         \
  EXTERN template TileProduct<T> tile_of<T>(int, int); \
  EXTERN template TailProduct<T> tail_product_of<T>(int, int, int);
BNRNN_TILES(extern, float)
BNRNN_TILES(extern, double)

}  // namespace bnrnn
