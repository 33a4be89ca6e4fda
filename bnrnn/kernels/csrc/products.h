// Matrix products of tiles: kTileRows rows by up to kTileVectors vectors, held in registers.
//
// Each element is the sum over k in ascending order, one fused multiply-add at a time, regardless
// of its tile. Results therefore do not depend on how the work is split among threads.
#pragma once

#include <algorithm>
#include <vector>

#include "bfloat16.h"
#include "vectors.h"

namespace bnrnn {

// Tiles over up to kDepth of k use the same panel of the right operand, kDepth by kTileVectors vectors.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 of 32 registers are accumulators
// Such a tile reads less than the second-level cache can supply, and its beginning and end take 90
// cycles. So few, deep tiles are best, whose panel (128 KiB) fits only that cache.
constexpr ptrdiff_t kDepth = 512;
#else
constexpr int kTileRows = 4, kTileVectors = 3;  // 12 of 16 registers
constexpr ptrdiff_t kDepth = 256;  // the panel stays in the first-level cache
#endif

// The left operand of a product over a range of k: element (r, k) is a[r * a_row + k * a_k].
template <typename T>
struct Left {
  const T* a;
  ptrdiff_t a_row, a_k, depth;
};

// c[r][column...] (+)= the sum over the k of all left operands, one after another, from row `row`
// on; vector n of row k of the right operand is b[k * b_k + n * lanes]. Meanwhile, fetch a vector per
// k, from `ahead` on, into the second-level cache.
template <typename T, int R, int N>
void tile_product(
    const Left<T>* lefts, ptrdiff_t count, ptrdiff_t row, const T* b, ptrdiff_t b_k, T* const* c,
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
    const ptrdiff_t a_row = lefts[i].a_row, a_k = lefts[i].a_k, depth = lefts[i].depth;
    const T* const a = lefts[i].a + row * a_row;
    for (ptrdiff_t k = 0; k < depth; ++k, b += b_k, ahead += lanes) {
      __builtin_prefetch(ahead, 0, 2);
      Vector<T> right[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) right[n] = load(b + n * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vector<T> left = broadcast(a[r * a_row + k * a_k]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[r][n] += left * right[n];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c[r] + column + n * lanes, sums[r][n]);
  }
}

// Two tiles of kTileRows rows by one vector, over the k of one left operand each. One tile alone has
// fewer sums than the processor can add to at a time.
template <typename T>
void tile_pair_product(
    const Left<T>& first, const Left<T>& second, const T* b, T* const* c, ptrdiff_t column, bool add) {
  Vector<T> sums[2 * kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < 2 * kTileRows; ++r) sums[r] = add ? load(c[r] + column) : zero<T>();
  for (ptrdiff_t k = 0; k < first.depth; ++k) {
    const Vector<T> right = load(b + k * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      sums[r] += broadcast(first.a[r * first.a_row + k * first.a_k]) * right;
      sums[kTileRows + r] += broadcast(second.a[r * second.a_row + k * second.a_k]) * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < 2 * kTileRows; ++r) store(c[r] + column, sums[r]);
}

template <typename T>
using TileProduct = void (*)(
    const Left<T>*, ptrdiff_t, ptrdiff_t, const T*, ptrdiff_t, T* const*, ptrdiff_t, bool, const T*);

template <typename T, int R>
TileProduct<T> tile_of(int vectors) {
  if constexpr (kTileVectors >= 4) {
    if (vectors == 4) return tile_product<T, R, 4>;
  }
  if constexpr (kTileVectors >= 3) {
    if (vectors == 3) return tile_product<T, R, 3>;
  }
  return vectors == 2 ? tile_product<T, R, 2> : tile_product<T, R, 1>;
}

template <typename T>
TileProduct<T> tile_of(int rows, int vectors) {
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

struct Range {
  ptrdiff_t begin, end;
  ptrdiff_t size() const { return end - begin; }
};

// Part `i` of a range split into `parts` nearly equal parts.
inline Range part(Range whole, ptrdiff_t parts, ptrdiff_t i) {
  const ptrdiff_t n = whole.size();
  return {whole.begin + n * i / parts, whole.begin + n * (i + 1) / parts};
}

inline ptrdiff_t ceil_div(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

inline ptrdiff_t whole_tiles(ptrdiff_t rows) { return ceil_div(rows, kTileRows) * kTileRows; }

// Visit the columns of a (W,) row in nearly equal chunks of at most kTileVectors vectors.
template <typename T, typename Visit>
void for_column_chunks(ptrdiff_t width, Visit&& visit) {
  const ptrdiff_t vectors = width / kLanes<T>, chunks = ceil_div(vectors, kTileVectors);
  for (ptrdiff_t i = 0; i < chunks; ++i) {
    const Range chunk = part({0, vectors}, chunks, i);
    visit(chunk.begin * kLanes<T>, static_cast<int>(chunk.size()));
  }
}

// Pack the first `rows` rows of a matrix into panels for tile_product, as
// [block of kDepth][tile][k][kTileRows]; at(row, k) is the element. Elements of the last tile
// beyond the last row are not written.
template <typename T, typename At>
void pack(T* packed, ptrdiff_t rows, ptrdiff_t depth, At&& at) {
  for (ptrdiff_t k0 = 0; k0 < depth; k0 += kDepth) {
    const ptrdiff_t deep = std::min(kDepth, depth - k0);
    for (ptrdiff_t r0 = 0; r0 < rows; r0 += kTileRows) {
      const ptrdiff_t count = std::min<ptrdiff_t>(kTileRows, rows - r0);
      if (count == kTileRows) {
        for (ptrdiff_t k = 0; k < deep; ++k) {
#pragma GCC unroll 8
          for (ptrdiff_t r = 0; r < kTileRows; ++r) packed[k * kTileRows + r] = at(r0 + r, k0 + k);
        }
      } else {
        for (ptrdiff_t k = 0; k < deep; ++k) {
          for (ptrdiff_t r = 0; r < count; ++r) packed[k * kTileRows + r] = at(r0 + r, k0 + k);
        }
      }
      packed += deep * kTileRows;
    }
  }
}

// The product for a single sequence, such as a streamed text: no tiles, each weight is read once.
template <typename T>
T dot(const T* a, const T* b, ptrdiff_t n) {
  constexpr int lanes = kLanes<T>, kSums = 4;
  Vector<T> sums[kSums] = {};
  ptrdiff_t k = 0;
  for (; k + kSums * lanes <= n; k += kSums * lanes) {
    for (int i = 0; i < kSums; ++i) sums[i] += load(a + k + i * lanes) * load(b + k + i * lanes);
  }
  for (; k < n; k += lanes) {
    const int rest = static_cast<int>(std::min<ptrdiff_t>(lanes, n - k));
    sums[0] += load_first(a + k, rest) * load_first(b + k, rest);
  }
  return sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Memory of T as elements in bfloat16.
template <typename T>
Bf16* as_bf16(T* memory) {
  return reinterpret_cast<Bf16*>(memory);
}

template <typename T>
const Bf16* as_bf16(const T* memory) {
  return reinterpret_cast<const Bf16*>(memory);
}

// The layout of the right operand (depth, width) of packed_product: one chunk of columns after
// another, so that a tile reads contiguous memory for any width. Rows whose distance is a power of
// two would compete for a few sets of the cache. If `bf16`, that of bf16_product.
template <typename T>
class RightLayout {
 public:
  explicit RightLayout(ptrdiff_t width, bool bf16 = false) : bf16(bf16) {
    for_column_chunks<T>(width, [&](ptrdiff_t column, int vectors) {
      for (int n = 0; n < vectors; ++n) {
        places.push_back({column, vectors * kLanes<T>, n * kLanes<T>});
      }
    });
  }

  // The vector of row k that begins at this column.
  T* at(T* panel, ptrdiff_t depth, ptrdiff_t k, ptrdiff_t column) const {
    const Place& place = places[column / kLanes<T>];
    return panel + place.chunk * depth + k * place.across + place.within;
  }

  // Write the vector of row k that begins at this column.
  void put(T* panel, ptrdiff_t depth, ptrdiff_t k, ptrdiff_t column, Vector<T> x) const {
    if (bf16) {
      put_bf16_right<T>(bf16_right_at(as_bf16(panel), bf16_blocks(depth), k, column), k, x);
    } else {
      store(at(panel, depth, k, column), x);
    }
  }

  const bool bf16;

 private:
  struct Place {
    ptrdiff_t chunk, across, within;  // the chunk's first column and its width; columns before it
  };
  std::vector<Place> places;  // of each vector of a row
};

// c[row][0..width) (+)= left (rows, depth) times right (depth, width). left_at(row, k, depth) is the
// left operand of the tile that begins at this row and k. Half or more of the right operand comes from
// the caches of other processors, so the tiles of each part of it fetch the next part.
template <typename T, typename LeftAt>
void tiled_product(
    LeftAt&& left_at, ptrdiff_t rows, ptrdiff_t depth, const T* right, ptrdiff_t width, T* const* c,
    bool add) {
  for_column_chunks<T>(width, [&](ptrdiff_t column, int vectors) {
    const ptrdiff_t across = vectors * kLanes<T>;
    for (ptrdiff_t k0 = 0; k0 < depth; k0 += kDepth) {
      const ptrdiff_t deep = std::min(kDepth, depth - k0);
      const T *const b = right + column * depth + k0 * across, *const next = b + deep * across;
      ptrdiff_t r0 = 0;
      for (; vectors == 1 && r0 + 2 * kTileRows <= rows; r0 += 2 * kTileRows) {
        tile_pair_product<T>(left_at(r0, k0, deep), left_at(r0 + kTileRows, k0, deep), b, c + r0,
                             column, add || k0 > 0);
      }
      for (ptrdiff_t tile = 0; r0 < rows; r0 += kTileRows, ++tile) {
        const int count = static_cast<int>(std::min<ptrdiff_t>(kTileRows, rows - r0));
        const Left<T> left = left_at(r0, k0, deep);
        const T* const ahead = tile < vectors ? next + tile * deep * kLanes<T> : b;
        tile_of<T>(count, vectors)(&left, 1, 0, b, across, c + r0, column, add || k0 > 0, ahead);
      }
    }
  });
}

// The product with a left operand that `pack` made.
template <typename T>
void packed_product(
    const T* packed, ptrdiff_t rows, ptrdiff_t depth, const T* right, ptrdiff_t width, T* const* c,
    bool add) {
  const auto left_at = [&](ptrdiff_t row, ptrdiff_t k, ptrdiff_t deep) {
    return Left<T>{packed + whole_tiles(rows) * k + row * deep, 1, kTileRows, deep};
  };
  tiled_product<T>(left_at, rows, depth, right, width, c, add);
}

// The product with a left operand whose rows (depth,) follow one another.
template <typename T>
void plain_product(
    const T* matrix, ptrdiff_t rows, ptrdiff_t depth, const T* right, ptrdiff_t width, T* const* c,
    bool add) {
  const auto left_at = [&](ptrdiff_t row, ptrdiff_t k, ptrdiff_t deep) {
    return Left<T>{matrix + row * depth + k, depth, 1, deep};
  };
  tiled_product<T>(left_at, rows, depth, right, width, c, add);
}

}  // namespace bnrnn
