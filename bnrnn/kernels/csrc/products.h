// Matrix products of tiles: kTileRows rows by up to kTileVectors vectors, held in registers.
//
// Each element is the sum over k in ascending order, one fused multiply-add at a time, whatever
// tile it falls into: so results do not depend on how the work is shared among threads.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace bnrnn {

constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;  // 24 accumulators of 32 registers
#else
constexpr int kTileVectors = 2;  // 12 of 16
#endif
// A panel of the right operand, kDepth by kTileVectors vectors, stays in the first-level cache.
constexpr ptrdiff_t kDepth = 128;

// c[r][column...] (+)= sum over k of a[r * a_row + k * a_k] * b[k * b_k + column...]
template <typename T, int R, int N>
void tile_product(
    const T* a, ptrdiff_t a_row, ptrdiff_t a_k, const T* b, ptrdiff_t b_k, ptrdiff_t depth,
    T* const* c, ptrdiff_t column, bool add) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      sums[r][n] = add ? load(c[r] + column + n * lanes) : zero<T>();
    }
  }
  for (ptrdiff_t k = 0; k < depth; ++k) {
    Vector<T> right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = load(b + k * b_k + n * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> left = broadcast(a[r * a_row + k * a_k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c[r] + column + n * lanes, sums[r][n]);
  }
}

template <typename T>
using TileProduct = void (*)(
    const T*, ptrdiff_t, ptrdiff_t, const T*, ptrdiff_t, ptrdiff_t, T* const*, ptrdiff_t, bool);

template <typename T, int R>
TileProduct<T> tile_of(int vectors) {
  if constexpr (kTileVectors >= 4) {
    if (vectors == 4) return tile_product<T, R, 4>;
    if (vectors == 3) return tile_product<T, R, 3>;
  }
  return vectors == 2 ? tile_product<T, R, 2> : tile_product<T, R, 1>;
}

template <typename T>
TileProduct<T> tile_of(int rows, int vectors) {
  switch (rows) {
    case 1: return tile_of<T, 1>(vectors);
    case 2: return tile_of<T, 2>(vectors);
    case 3: return tile_of<T, 3>(vectors);
    case 4: return tile_of<T, 4>(vectors);
    case 5: return tile_of<T, 5>(vectors);
    default: return tile_of<T, 6>(vectors);
  }
}

}  // namespace bnrnn
