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

// to[v * to_stride + row] = the product of a row of `matrix`, (rows, depth), and vector v, for a
// few vectors (depth,), such as a step of a streamed text: packing would take longer than the
// product.
template <typename T>
void multiply_few(const T* matrix, ptrdiff_t rows, ptrdiff_t depth, const T* vectors,
                  ptrdiff_t stride, ptrdiff_t count, T* to, ptrdiff_t to_stride);

}  // namespace bnrnn
