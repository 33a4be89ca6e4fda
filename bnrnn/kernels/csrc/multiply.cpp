#include "multiply.h"

#include <omp.h>

#include <vector>

#include "products.h"

namespace bnrnn {
namespace {

// A block of the result and, kDeep of k at a time, of both operands fit into the second-level
// cache. A block is wide because each packs its rows of `a` again.
constexpr ptrdiff_t kRows = 120, kDeep = 128;
static_assert(kDeep <= kDepth && kRows % kTileRows == 0 && kRows % kTallRows<float> == 0);
template <typename T>
constexpr ptrdiff_t kColumns = 16 * kTileVectors * kLanes<T>;

// One block of c, over all of k.
template <typename T>
class Block {
 public:
  // For up to this many columns of `b`, and k.
  Block(ptrdiff_t columns, ptrdiff_t depth)
      : across(ceil_div(std::min(columns, kColumns<T>), kLanes<T>) * kLanes<T>),
        left(kRows * std::min(whole_runs(depth), kDeep)),
        right(std::min(depth, kDeep) * across),
        result(kRows * across) {}

  void multiply(const Matrix<const T>& a, const Matrix<const T>& b, T* c, Range rows,
                Range columns) {
    const ptrdiff_t width = ceil_div(columns.size(), kLanes<T>) * kLanes<T>;
    const RightLayout<T> layout(width);
    T* to[kRows];
    for (ptrdiff_t r = 0; r < kRows; ++r) to[r] = result.data() + r * across;
    for (ptrdiff_t k0 = 0; k0 < a.columns; k0 += kDeep) {
      const ptrdiff_t deep = std::min(kDeep, a.columns - k0);
      const T* const from = &a.at(rows.begin, k0);
      if (a.column_stride == 1) {
        pack(left.data(), rows.size(), deep, layout.tile_rows,
             [from, stride = a.row_stride](ptrdiff_t r, ptrdiff_t k) {
               return from[r * stride + k];
             });
      } else {
        pack(left.data(), rows.size(), deep, layout.tile_rows,
             [from, &a](ptrdiff_t r, ptrdiff_t k) {
               return from[r * a.row_stride + k * a.column_stride];
             });
      }
      for (ptrdiff_t k = 0; k < deep; ++k) {
        const T* const row = &b.at(k0 + k, columns.begin);
        for (ptrdiff_t j = 0; j < width; j += kLanes<T>) {
          const int n = static_cast<int>(std::min<ptrdiff_t>(kLanes<T>, columns.size() - j));
          store(layout.at(right.data(), deep, k, j), load_first(row + j, n));
        }
      }
      packed_product(left.data(), rows.size(), deep, right.data(), layout, to, k0 > 0);
    }
    for (ptrdiff_t r = 0; r < rows.size(); ++r) {
      std::copy_n(to[r], columns.size(), c + (rows.begin + r) * b.columns + columns.begin);
    }
  }

 private:
  const ptrdiff_t across;  // the distance of the rows of `result`
  Rows<T> left, right, result;
};

// The sums of a tile of multiply_few stay in registers, and the lanes of all of them are added at
// once.
#if defined(__AVX512F__)
constexpr int kSums = 16;
#else
constexpr int kSums = 8;
#endif

// found[v * kRows + row], for kRows rows and kVectors vectors, of which those beyond `rows` and
// `count` repeat the last.
template <typename T, int kVectors>
void few_product(const T* matrix, ptrdiff_t rows, ptrdiff_t depth, const T* vectors,
                 ptrdiff_t stride, ptrdiff_t count, T* found) {
  constexpr int kRows = kSums / kVectors, lanes = kLanes<T>;
  const T *of_row[kRows], *of_vector[kVectors];
  for (int r = 0; r < kRows; ++r) of_row[r] = matrix + std::min<ptrdiff_t>(r, rows - 1) * depth;
  for (int v = 0; v < kVectors; ++v) {
    of_vector[v] = vectors + std::min<ptrdiff_t>(v, count - 1) * stride;
  }
  Vector<T> sums[kSums] = {};
  const auto add = [&](auto&& load_at) {
    Vector<T> right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load_at(of_vector[v]);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector<T> left = load_at(of_row[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[v * kRows + r] += left * right[v];
    }
  };
  ptrdiff_t k = 0;
  for (; k + lanes <= depth; k += lanes) {
    add([k](const T* row) { return load(row + k); });
  }
  const int rest = static_cast<int>(depth - k);
  if (rest > 0) add([k, rest](const T* row) { return load_first(row + k, rest); });
  sum<T>(sums, found);
}

}  // namespace

template <typename T>
void multiply(Matrix<const T> a, Matrix<const T> b, T* c, int threads) {
  const ptrdiff_t across = ceil_div(b.columns, kColumns<T>);
  const ptrdiff_t down = std::max(ceil_div(a.rows, kRows), ceil_div(threads, across));
#pragma omp parallel num_threads(threads)
  {
    Block<T> block(b.columns, a.columns);
#pragma omp for schedule(static)
    for (ptrdiff_t i = 0; i < down * across; ++i) {
      block.multiply(a, b, c, part({0, a.rows}, down, i / across),
                     part({0, b.columns}, across, i % across));
    }
  }
}

template <typename T>
void multiply_few(const T* matrix, ptrdiff_t rows, ptrdiff_t depth, const T* vectors,
                  ptrdiff_t stride, ptrdiff_t count, T* to, ptrdiff_t to_stride) {
  constexpr ptrdiff_t kMost = 4;
  const ptrdiff_t together = count == 1 ? 1 : count == 2 ? 2 : kMost, tile_rows = kSums / together;
  const auto product = together == 1   ? few_product<T, 1>
                       : together == 2 ? few_product<T, 2>
                                       : few_product<T, kMost>;
  for (ptrdiff_t r = 0; r < rows; r += tile_rows) {
    const ptrdiff_t here = std::min(tile_rows, rows - r);
    for (ptrdiff_t v = 0; v < count; v += together) {
      T found[kSums];
      product(matrix + r * depth, here, depth, vectors + v * stride, stride, count - v, found);
      for (ptrdiff_t i = 0; i < std::min(together, count - v); ++i) {
        std::copy_n(found + i * tile_rows, here, to + (v + i) * to_stride + r);
      }
    }
  }
}

template void multiply(Matrix<const float>, Matrix<const float>, float*, int);
template void multiply(Matrix<const double>, Matrix<const double>, double*, int);
template void multiply_few(const float*, ptrdiff_t, ptrdiff_t, const float*, ptrdiff_t, ptrdiff_t,
                           float*, ptrdiff_t);
template void multiply_few(const double*, ptrdiff_t, ptrdiff_t, const double*, ptrdiff_t, ptrdiff_t,
                           double*, ptrdiff_t);

}  // namespace bnrnn
