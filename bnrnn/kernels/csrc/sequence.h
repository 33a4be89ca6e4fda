// Sequence-wise statistics of the input term: over all frames of the batch. Those of one-hot inputs
// follow from the columns of W_x, each weighted by how often its symbol occurs.
#pragma once

#include <vector>

#include "share.h"

namespace bnrnn {

// visit(feature, i) for the features of the thread's units; i counts them.
template <typename T, typename Visit>
void for_features(const Share<T>& share, Visit&& visit) {
  const Range units = share.units;
  for (int gate = 0; gate < kGates; ++gate) {
    for (ptrdiff_t j = units.begin; j < units.end; ++j) {
      visit(gate * share.H + j, gate * units.size() + j - units.begin);
    }
  }
}

// to[i] = sum over all frames of of(y, i) for the i-th feature of the thread, y being its values.
// Partial sums keep the rounding errors of long sums small.
template <typename T, typename Of>
void sum_frames(const Share<T>& share, T* to, Of&& of) {
  const Problem<T>& p = share.p;
  const ptrdiff_t n = kGates * share.units.size(), lanes = kLanes<T>;
  constexpr ptrdiff_t kChunk = 64;  // steps or symbols
  Rows<T> total(n * lanes), partial(n * lanes);
  const ptrdiff_t rows = p.index != nullptr ? p.input_size : p.steps;
  for (ptrdiff_t begin = 0; begin < rows; begin += kChunk) {
    std::fill(partial.begin(), partial.end(), T(0));
    for (ptrdiff_t row = begin; row < std::min(rows, begin + kChunk); ++row) {
      if (p.index != nullptr && p.symbol_weights[row] == 0) continue;
      for_features(share, [&](ptrdiff_t feature, ptrdiff_t i) {
        T* const sum = partial.data() + i * lanes;
        if (p.index != nullptr) {
          const T y = p.columns[row * p.symbol_stride + feature * p.feature_stride];
          sum[0] += p.symbol_weights[row] * of(broadcast(y), i)[0];
          return;
        }
        const T *y = share.term_at(row, feature), *live = share.live_at(row);
        Vector<T> sums = load(sum);
        for (ptrdiff_t b = 0; b < share.W; b += lanes) sums += load(live + b) * of(load(y + b), i);
        store(sum, sums);
      });
    }
    for (ptrdiff_t i = 0; i < n * lanes; ++i) total[i] += partial[i];
  }
  for (ptrdiff_t i = 0; i < n; ++i) to[i] = sum<T>(load(total.data() + i * lanes));
}

// Mean and variance over all frames, for the thread's units.
template <typename T>
void sequence_moments(const Share<T>& share) {
  const Problem<T>& p = share.p;
  std::vector<T> mean(kGates * share.units.size()), var(mean.size());
  sum_frames(share, mean.data(), [](Vector<T> y, ptrdiff_t) { return y; });
  for (T& of : mean) of /= p.sequence_total;
  sum_frames(share, var.data(),
             [&](Vector<T> y, ptrdiff_t i) { return (y - mean[i]) * (y - mean[i]); });
  for_features(share, [&](ptrdiff_t feature, ptrdiff_t i) {
    p.ih.mean[feature] = mean[i];
    p.ih.var[feature] = var[i] / p.sequence_total;
  });
}

// Propagate the gradient of the normalised input term, which the steps have stored, through the
// statistics.
template <typename T>
void sequence_gradient(const Share<T>& share) {
  const Problem<T>& p = share.p;
  const ptrdiff_t features = kGates * share.H;
  const auto through = [&](ptrdiff_t feature, Vector<T> y, Vector<T> grad, Vector<T> weight) {
    const T rstd = 1 / std::sqrt(p.ih.var[feature] + p.ih.eps);
    const Vector<T> hat = (y - p.ih.mean[feature]) * rstd;
    const Vector<T> off = p.grad_bias[feature] + hat * p.ih.grad_gamma[feature];
    return (grad - weight / p.sequence_total * off) * (rstd * p.ih.gamma[feature]);
  };
  if (p.index != nullptr) {
    if (p.grad_columns == nullptr) return;
    for (ptrdiff_t symbol = 0; symbol < p.input_size; ++symbol) {
      for_features(share, [&](ptrdiff_t feature, ptrdiff_t) {
        const ptrdiff_t i = symbol * p.symbol_stride + feature * p.feature_stride;
        T* const grad = p.grad_columns + i;
        const T y = p.columns[i];
        const Vector<T> weight = broadcast(p.symbol_weights[symbol]);
        *grad = through(feature, broadcast(y), broadcast(*grad), weight)[0];
      });
    }
    return;
  }
  for (ptrdiff_t t = 0; t < p.steps; ++t) {
    T* const panel = share.input_panel_at(t, features);
    for_features(share, [&](ptrdiff_t feature, ptrdiff_t) {
      for (ptrdiff_t b = 0; b < share.W; b += kLanes<T>) {
        T* const grad = share.input_layout.at(panel, features, feature, b);
        const Vector<T> y = load(share.term_at(t, feature) + b), live = load(share.live_at(t) + b);
        store(grad, through(feature, y, load(grad), live));
      }
    });
  }
}

}  // namespace bnrnn
