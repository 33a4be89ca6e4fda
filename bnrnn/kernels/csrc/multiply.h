// The product of two matrices, the same bit for bit for any number of threads, which
// a library's product is not where it shares out a long sum.
#pragma once

#include <cstddef>

namespace bnrnn {

template <typename T>
struct Matrix {
  T* data;
  ptrdiff_t rows, columns, row_stride, column_stride;
  T& at(ptrdiff_t row, ptrdiff_t column) const {
    return data[row * row_stride + column * column_stride];
  }
};

// c (a.rows, b.columns), contiguous, becomes a b; a may have any strides, b contiguous rows.
template <typename T>
void multiply(Matrix<const T> a, Matrix<const T> b, T* c, int threads);

}  // namespace bnrnn
