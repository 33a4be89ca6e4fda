// Sequence-wise statistics of the input term.
#pragma once

#include <vector>

#include "share.h"

namespace bnrnn {

// The number of rows in the whole-sequence statistics. They are the rows of `term`, or those of
// `columns`, each weighted by how often it occurs.
template <typename T>
ptrdiff_t sequence_rows(const Problem<T>& p) {
  return p.index != nullptr ? p.input_size : p.steps * p.batch;
}

// Mean and variance over these rows, for the thread's units.
template <typename T>
void sequence_moments(const Share<T>& share) {
  const Problem<T>& p = share.p;
  const Range units = share.units;
  const ptrdiff_t H = share.H;
  const T* rows = p.index != nullptr ? p.columns : p.term;
  const ptrdiff_t features = kGates * H, n = sequence_rows(p);
  constexpr ptrdiff_t kChunk = 64;  // partial sums keep the rounding errors of long sums small
  std::vector<T> total(units.size()), partial(units.size());
  for (int gate = 0; gate < kGates; ++gate) {
    const ptrdiff_t first = gate * H + units.begin;
    T *mean = p.ih.mean + first, *var = p.ih.var + first;
    for (const bool squares : {false, true}) {
      std::fill(total.begin(), total.end(), T(0));
      for (ptrdiff_t begin = 0; begin < n; begin += kChunk) {
        std::fill(partial.begin(), partial.end(), T(0));
        for (ptrdiff_t row = begin; row < std::min(n, begin + kChunk); ++row) {
          const T weight = p.sequence_weights[row];
          if (weight == 0) continue;
          const T* y = rows + row * features + first;
          for (ptrdiff_t j = 0; j < units.size(); ++j) {
            const T off = squares ? (y[j] - mean[j]) * (y[j] - mean[j]) : y[j];
            partial[j] += weight * off;
          }
        }
        for (ptrdiff_t j = 0; j < units.size(); ++j) total[j] += partial[j];
      }
      T* to = squares ? var : mean;
      for (ptrdiff_t j = 0; j < units.size(); ++j) to[j] = total[j] / p.sequence_total;
    }
  }
}

// Propagate the gradient of the normalised input term, which the steps have stored, through the
// statistics.
template <typename T>
void sequence_gradient(const Share<T>& share) {
  const Problem<T>& p = share.p;
  const Range units = share.units;
  const ptrdiff_t H = share.H;
  T* grads = p.index != nullptr ? p.grad_columns : p.grad_term;
  if (grads == nullptr) return;
  const T* rows = p.index != nullptr ? p.columns : p.term;
  const ptrdiff_t features = kGates * H, n = sequence_rows(p);
  for (int gate = 0; gate < kGates; ++gate) {
    const ptrdiff_t first = gate * H + units.begin;
    std::vector<Standard<T>> of_x(units.size());
    for (ptrdiff_t j = 0; j < units.size(); ++j) {
      of_x[j] = standard_at(p.ih, 0, first + j, features);
    }
    for (ptrdiff_t row = 0; row < n; ++row) {
      const T* y = rows + row * features + first;
      T* grad = grads + row * features + first;
      const T share = p.sequence_weights[row] / p.sequence_total;
      for (ptrdiff_t j = 0; j < units.size(); ++j) {
        const T hat = (y[j] - of_x[j].mean) * of_x[j].rstd;
        const T off = p.grad_bias[first + j] + hat * p.ih.grad_gamma[first + j];
        grad[j] = (grad[j] - share * off) * of_x[j].scale();
      }
    }
  }
}

}  // namespace bnrnn
