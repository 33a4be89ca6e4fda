// Conversion between PyTorch's batch-major arrays and the kernel's feature-major arrays. Whole
// blocks have a path of their own.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace bnrnn {

// Not inlined: its copies in all callers would take 1.3 seconds more to compile, and run no faster.
template <typename T>
[[gnu::noinline]] void transpose_block(Vector<T> (&rows)[kLanes<T>]) {
  transpose<T>(rows);
}

// Batch-major to feature-major: put(u, b, vector) gets vectors of the batch of one unit, for
// `count` units, from the elements from(b)[u]; zero in the columns from B up to W.
template <typename T, typename From, typename Put>
void transpose_in(ptrdiff_t count, ptrdiff_t batch, ptrdiff_t width, From&& from, Put&& put) {
  constexpr int lanes = kLanes<T>;
  for (ptrdiff_t b0 = 0; b0 < width; b0 += lanes) {
    const T* rows[lanes];
    for (int i = 0; i < lanes; ++i) rows[i] = b0 + i < batch ? from(b0 + i) : nullptr;
    for (ptrdiff_t u0 = 0; u0 < count; u0 += lanes) {
      const int n = static_cast<int>(std::min<ptrdiff_t>(lanes, count - u0));
      Vector<T> block[lanes];
      if (n == lanes && b0 + lanes <= batch) {
        for (int i = 0; i < lanes; ++i) block[i] = load(rows[i] + u0);
        transpose_block<T>(block);
        for (int i = 0; i < lanes; ++i) put(u0 + i, b0, block[i]);
      } else {
        for (int i = 0; i < lanes; ++i) {
          block[i] = rows[i] != nullptr ? load_first(rows[i] + u0, n) : zero<T>();
        }
        transpose_block<T>(block);
        for (int i = 0; i < n; ++i) put(u0 + i, b0, block[i]);
      }
    }
  }
}

// Feature-major to batch-major: from(u, b) is the vector of unit u that begins at sequence b;
// visit(b, u, count, vector) gets vectors of the units of one sequence.
template <typename T, typename From, typename Visit>
void transpose_out(ptrdiff_t count, ptrdiff_t batch, From&& from, Visit&& visit) {
  constexpr int lanes = kLanes<T>;
  for (ptrdiff_t b0 = 0; b0 < batch; b0 += lanes) {
    for (ptrdiff_t u0 = 0; u0 < count; u0 += lanes) {
      const int n = static_cast<int>(std::min<ptrdiff_t>(lanes, count - u0));
      Vector<T> block[lanes];
      if (n == lanes && b0 + lanes <= batch) {
        for (int i = 0; i < lanes; ++i) block[i] = from(u0 + i, b0);
        transpose_block<T>(block);
        for (int i = 0; i < lanes; ++i) visit(b0 + i, u0, lanes, block[i]);
      } else {
        for (int i = 0; i < lanes; ++i) {
          block[i] = i < n ? from(u0 + i, b0) : zero<T>();
        }
        transpose_block<T>(block);
        for (int i = 0; i < lanes && b0 + i < batch; ++i) visit(b0 + i, u0, n, block[i]);
      }
    }
  }
}

}  // namespace bnrnn
