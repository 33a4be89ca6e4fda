// Matrix products: how the operands are laid out, and the order of their tiles.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "tiles.h"

namespace bnrnn {

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

inline ptrdiff_t whole_tiles(ptrdiff_t rows, ptrdiff_t tile_rows) {
  return ceil_div(rows, tile_rows) * tile_rows;
}

// The number of chunks of columns of a (W,) row, each of at most kTileVectors vectors.
template <typename T>
ptrdiff_t column_chunks(ptrdiff_t width) {
  return ceil_div(width / kLanes<T>, kTileVectors);
}

// The rows of the tiles of a product of this width.
template <typename T>
int tile_rows_for(ptrdiff_t width) {
  const bool tall = width / kLanes<T> <= column_chunks<T>(width) * (kTileVectors - 1);
  return tall ? kTallRows<T> : kTileRows;
}

// Visit the columns of a (W,) row in chunks of nearly equal size.
template <typename T, typename Visit>
void for_column_chunks(ptrdiff_t width, Visit&& visit) {
  const ptrdiff_t vectors = width / kLanes<T>, chunks = column_chunks<T>(width);
  for (ptrdiff_t i = 0; i < chunks; ++i) {
    const Range chunk = part({0, vectors}, chunks, i);
    visit(chunk.begin * kLanes<T>, static_cast<int>(chunk.size()));
  }
}

inline ptrdiff_t whole_runs(ptrdiff_t depth) { return ceil_div(depth, kRun) * kRun; }

// Pack the first `rows` rows of a matrix into panels for tile_product, as
// [block of kDepth][tile][run][row of the tile][kRun]; at(row, k) is the element, zero beyond the
// last row and the last k.
template <typename T, typename At>
void pack(T* packed, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t tile_rows, At&& at) {
  for (ptrdiff_t k0 = 0; k0 < depth; k0 += kDepth) {
    const ptrdiff_t end = std::min(k0 + kDepth, depth);
    for (ptrdiff_t r0 = 0; r0 < rows; r0 += tile_rows) {
      for (ptrdiff_t k = k0; k < end; k += kRun) {
        const bool whole = r0 + tile_rows <= rows && k + kRun <= end;
        for (ptrdiff_t r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 4
          for (ptrdiff_t i = 0; i < kRun; ++i) {
            *packed++ = whole || (r0 + r < rows && k + i < end) ? at(r0 + r, k + i) : T(0);
          }
        }
      }
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
//
// If the last vector of a row has only `last` columns, and these fill at most half of it, they are
// the tail, a chunk whose rows have no more columns than needed: a vector then holds the columns of
// several k, which tail_product multiplies together.
template <typename T>
class RightLayout {
 public:
  explicit RightLayout(ptrdiff_t width, ptrdiff_t last = kLanes<T>, bool bf16 = false)
      : bf16(bf16),
        together(bf16                       ? 1
                 : last * kRun <= kLanes<T> ? kRun
                 : last * 2 <= kLanes<T>    ? 2
                                            : 1),
        whole(together == 1 ? width : width - kLanes<T>),
        tile_rows(tile_rows_for<T>(whole)) {
    for_chunks([&](ptrdiff_t column, ptrdiff_t across) {
      if (column < whole) chunks.push_back({column, across});
      for (ptrdiff_t n = 0; n < across; n += kLanes<T>) places.push_back({column, across, n});
    });
  }

  // visit(column, across): a chunk's first column, and its columns.
  template <typename Visit>
  void for_chunks(Visit&& visit) const {
    for_column_chunks<T>(
        whole, [&](ptrdiff_t column, int vectors) { visit(column, vectors * kLanes<T>); });
    if (together > 1) visit(whole, kLanes<T> / together);
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
    } else if (column < whole) {
      store(at(panel, depth, k, column), x);
    } else if (together == 2) {
      std::memcpy(at(panel, depth, k, column), &x, sizeof x / 2);
    } else {
      std::memcpy(at(panel, depth, k, column), &x, sizeof x / kRun);
    }
  }

  // Write all of row k, of which of(column) is the vector that begins at this column; not if
  // `bf16`.
  template <typename Of>
  BNRNN_INLINE void put_row(T* panel, ptrdiff_t depth, ptrdiff_t k, Of&& of) const {
    for (const Chunk& chunk : chunks) {
      T* const to = panel + chunk.column * depth + k * chunk.across;
      for (ptrdiff_t n = 0; n < chunk.across; n += kLanes<T>) store(to + n, of(chunk.column + n));
    }
    if (together > 1) put(panel, depth, k, whole, of(whole));
  }

  const bool bf16;
  const int together;     // how many k of the tail a vector holds; 1 if there is no tail
  const ptrdiff_t whole;  // columns before the tail
  const int tile_rows;    // of the left operand

 private:
  struct Chunk {
    ptrdiff_t column, across;
  };
  struct Place {
    ptrdiff_t chunk, across, within;  // the chunk's first column and its width; columns before it
  };
  std::vector<Chunk> chunks;  // before the tail
  std::vector<Place> places;  // of each vector of a row
};

// c[row][0..width) (+)= left (rows, depth) times right (depth, width). left_at(row, k, depth) is
// the left operand of the tile that begins at this row and k. Half or more of the right operand
// comes from the caches of other processors, so the tiles of each part of it fetch the next part.
template <typename T, typename LeftAt>
void tiled_product(LeftAt&& left_at, ptrdiff_t tile_rows, ptrdiff_t rows, ptrdiff_t depth,
                   const T* right, ptrdiff_t width, T* const* c, bool add) {
  for_column_chunks<T>(width, [&](ptrdiff_t column, int vectors) {
    const ptrdiff_t across = vectors * kLanes<T>;
    for (ptrdiff_t k0 = 0; k0 < depth; k0 += kDepth) {
      const ptrdiff_t deep = std::min(kDepth, depth - k0);
      const T *const b = right + column * depth + k0 * across, *const next = b + deep * across;
      ptrdiff_t r0 = 0;
      for (; vectors == 1 && r0 + 2 * tile_rows <= rows; r0 += 2 * tile_rows) {
        tile_pair_product<T>(left_at(r0, k0, deep), b, c + r0, column, add || k0 > 0);
      }
      for (ptrdiff_t tile = 0; r0 < rows; r0 += tile_rows, ++tile) {
        const int count = static_cast<int>(std::min(tile_rows, rows - r0));
        const Left<T> left = left_at(r0, k0, deep);
        const T* const ahead = tile < vectors ? next + tile * deep * kLanes<T> : b;
        tile_of<T>(count, vectors)(&left, 1, 0, b, c + r0, column, add || k0 > 0, ahead);
      }
    }
  });
}

// The product with a left operand that `pack` made for tiles of layout.tile_rows rows.
template <typename T>
void packed_product(const T* packed, ptrdiff_t rows, ptrdiff_t depth, const T* right,
                    const RightLayout<T>& layout, T* const* c, bool add) {
  const ptrdiff_t tile_rows = layout.tile_rows;
  const auto left_at = [&](ptrdiff_t row, ptrdiff_t k, ptrdiff_t deep) {
    const ptrdiff_t tile = tile_rows * whole_runs(deep);
    return Left<T>{packed + whole_tiles(rows, tile_rows) * k + row / tile_rows * tile, kRun, tile,
                   tile_rows * kRun, deep};
  };
  tiled_product<T>(left_at, tile_rows, rows, depth, right, layout.whole, c, add);
  if (layout.together == 1) return;
  const T* tail = right + layout.whole * depth;
  for (ptrdiff_t k0 = 0; k0 < depth; k0 += kDepth) {
    const ptrdiff_t deep = std::min(kDepth, depth - k0);
    for (ptrdiff_t r0 = 0; r0 < rows; r0 += 2 * tile_rows) {
      const auto product =
          tail_product_of<T>(layout.together, layout.tile_rows, rows - r0 > tile_rows ? 2 : 1);
      const Left<T> left = left_at(r0, k0, deep);
      product(&left, 1, 0, tail, c + r0, layout.whole, rows - r0, add || k0 > 0);
    }
    tail += deep * kLanes<T> / layout.together;
  }
}

// The product with a left operand whose rows (depth,) follow one another; the right one has no
// tail.
template <typename T>
void plain_product(const T* matrix, ptrdiff_t rows, ptrdiff_t depth, const T* right,
                   ptrdiff_t width, T* const* c, bool add) {
  const int tile_rows = tile_rows_for<T>(width);
  const auto left_at = [&](ptrdiff_t row, ptrdiff_t k, ptrdiff_t deep) {
    return contiguous_left(matrix + row * depth + k, depth, deep, tile_rows);
  };
  tiled_product<T>(left_at, tile_rows, rows, depth, right, width, c, add);
}

#define BNRNN_PRODUCTS(EXTERN, T)                                                            \
  EXTERN template void packed_product<T>(const T*, ptrdiff_t, ptrdiff_t, const T*,           \
                                         const RightLayout<T>&, T* const*, bool);            \
  EXTERN template void plain_product<T>(const T*, ptrdiff_t, ptrdiff_t, const T*, ptrdiff_t, \
                                        T* const*, bool);
BNRNN_PRODUCTS(extern, float)
BNRNN_PRODUCTS(extern, double)

}  // namespace bnrnn
