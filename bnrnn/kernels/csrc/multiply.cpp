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
  Block() : left(kRows * kDeep), right(kDeep * kColumns<T>), result(kRows * kColumns<T>) {}

  void multiply(const Matrix<const T>& a, const Matrix<const T>& b, T* c, Range rows,
                Range columns) {
    const ptrdiff_t width = ceil_div(columns.size(), kLanes<T>) * kLanes<T>;
    const RightLayout<T> layout(width);
    T* to[kRows];
    for (ptrdiff_t r = 0; r < kRows; ++r) to[r] = result.data() + r * kColumns<T>;
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
  Rows<T> left, right, result;
};

}  // namespace

template <typename T>
void multiply(Matrix<const T> a, Matrix<const T> b, T* c, int threads) {
  const ptrdiff_t across = ceil_div(b.columns, kColumns<T>);
  const ptrdiff_t down = std::max(ceil_div(a.rows, kRows), ceil_div(threads, across));
#pragma omp parallel num_threads(threads)
  {
    Block<T> block;
#pragma omp for schedule(static)
    for (ptrdiff_t i = 0; i < down * across; ++i) {
      block.multiply(a, b, c, part({0, a.rows}, down, i / across),
                     part({0, b.columns}, across, i % across));
    }
  }
}

template <typename T>
void multiply_few(const T* a, const T* b, T* c, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t depth,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (ptrdiff_t j = 0; j < columns; ++j) {
    for (ptrdiff_t r = 0; r < rows; ++r) {
      c[r * columns + j] = dot(a + r * depth, b + j * depth, depth);
    }
  }
}

template void multiply(Matrix<const float>, Matrix<const float>, float*, int);
template void multiply(Matrix<const double>, Matrix<const double>, double*, int);
template void multiply_few(const float*, const float*, float*, ptrdiff_t, ptrdiff_t, ptrdiff_t,
                           int);
template void multiply_few(const double*, const double*, double*, ptrdiff_t, ptrdiff_t, ptrdiff_t,
                           int);

}  // namespace bnrnn
