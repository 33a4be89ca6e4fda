// A matrix product whose result is bit-identical for any number of threads. A library's product is
// not, if it splits a long sum among threads.
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

// c = a b, with c (a.rows, b.columns) contiguous. a may have any strides; the rows of b must be
// contiguous.
template <typename T>
void multiply(Matrix<const T> a, Matrix<const T> b, T* c, int threads);

// c = a b^T for a few rows (depth,) of a, such as a step of a streamed text: packing would take
// longer than the product. a (rows, depth) and b (columns, depth) are contiguous.
template <typename T>
void multiply_few(const T* a, const T* b, T* c, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t depth,
                  int threads);

}  // namespace bnrnn
