// An input of symbols: W_x x_t consists of columns of W_x.
#pragma once

#include <type_traits>

#include "share.h"

namespace bnrnn {

#if defined(__AVX512F__)
// A row of up to 64 numbers in registers, of which elements are looked up.
class Lookup {
 public:
  static constexpr ptrdiff_t kMost = 64;

  Lookup(const float* row, ptrdiff_t count) {
    for (int i = 0; i < 4; ++i) {
      const int left = static_cast<int>(std::clamp<ptrdiff_t>(count - 16 * i, 0, 16));
      parts[i] = (__m512)load_first(row + (left > 0 ? 16 * i : 0), left);
    }
  }

  Vector<float> operator()(Integers<float> index) const {
    const __m512i i = (__m512i)index;
    const __m512 low = _mm512_permutex2var_ps(parts[0], i, parts[1]);
    const __m512 high = _mm512_permutex2var_ps(parts[2], i, parts[3]);
    return (Vector<float>)_mm512_mask_blend_ps(_mm512_test_epi32_mask(i, _mm512_set1_epi32(32)),
                                               low, high);
  }

 private:
  __m512 parts[4];
};
#endif

template <typename T>
class OneHotInput {
 public:
  explicit OneHotInput(const Share<T>& share)
      : p(share.p), H(share.H), W(share.W), indices(p.index == nullptr ? 0 : share.W) {}

  // Write the rows (W,) of a gate of the group's units at step t, one after another.
  void put_rows(ptrdiff_t t, int gate, Range group, T* rows) {
    const int64_t* const symbols = p.index + t * p.batch;
    const ptrdiff_t first = gate * H + group.begin;
    if (p.feature_stride == 1) {
      transpose_in<T>(
          group.size(), p.batch, W,
          [&](ptrdiff_t b) { return p.columns + symbols[b] * p.symbol_stride + first; },
          [&](ptrdiff_t u, ptrdiff_t b, Vector<T> term) { store(rows + u * W + b, term); });
      return;
    }
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
      if (p.input_size <= Lookup::kMost) {
        std::copy_n(symbols, p.batch, indices.begin());
        for (ptrdiff_t u = 0; u < group.size(); ++u) {
          const Lookup weights(p.columns + (first + u) * p.feature_stride, p.input_size);
          for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
            Integers<T> at;
            std::memcpy(&at, indices.data() + b, sizeof(at));
            store(rows + u * W + b, weights(at));
          }
        }
        return;
      }
    }
#endif
    for (ptrdiff_t u = 0; u < group.size(); ++u) {
      const T* const weights = p.columns + (first + u) * p.feature_stride;
      T* const row = rows + u * W;
      for (ptrdiff_t b = 0; b < p.batch; ++b) row[b] = weights[symbols[b]];
      std::fill(row + p.batch, row + W, T(0));
    }
  }

  // Add the gradients of these rows to those of W_x.
  void add_gradient(ptrdiff_t t, int gate, Range group, const T* rows) const {
    const int64_t* const symbols = p.index + t * p.batch;
    const ptrdiff_t first = gate * H + group.begin;
    if (p.feature_stride == 1) {
      transpose_out<T>(
          group.size(), p.batch, [&](ptrdiff_t u, ptrdiff_t b) { return load(rows + u * W + b); },
          [&](ptrdiff_t b, ptrdiff_t u0, int n, Vector<T> grad) {
            T* const to = p.grad_columns + symbols[b] * p.symbol_stride + first + u0;
            store_first(to, load_first(to, n) + grad, n);
          });
      return;
    }
    // Several rows at once: additions to the same element wait for one another.
    constexpr ptrdiff_t kTogether = 4;
    ptrdiff_t u = 0;
    for (; u + kTogether <= group.size(); u += kTogether) {
      T* const to = p.grad_columns + (first + u) * p.feature_stride;
      for (ptrdiff_t b = 0; b < p.batch; ++b) {
#pragma GCC unroll 4
        for (ptrdiff_t i = 0; i < kTogether; ++i) {
          to[i * p.feature_stride + symbols[b]] += rows[(u + i) * W + b];
        }
      }
    }
    for (; u < group.size(); ++u) {
      T* const to = p.grad_columns + (first + u) * p.feature_stride;
      for (ptrdiff_t b = 0; b < p.batch; ++b) to[symbols[b]] += rows[u * W + b];
    }
  }

 private:
  const Problem<T>& p;
  const ptrdiff_t H, W;
  std::vector<int32_t> indices;  // the symbols of a step
};

}  // namespace bnrnn
