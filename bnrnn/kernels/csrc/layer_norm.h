// Layer normalisation: mean and variance over the features of each sequence separately. Each thread
// owns a range of hidden units and writes the partial sums of each unit to memory that all threads
// can read. After a barrier, each thread sums the parts of all units, in the same order.
#pragma once

#include <array>
#include <vector>

#include "share.h"

namespace bnrnn {

// to[b] = sum of part(j, b) over all units j. Partial sums keep rounding errors of long sums small.
template <typename T, typename Part>
void sum_units(ptrdiff_t hidden, ptrdiff_t width, T* to, Part&& part) {
  constexpr ptrdiff_t kChunk = 64, kTogether = 4, lanes = kLanes<T>;
  for (ptrdiff_t b0 = 0; b0 < width; b0 += kTogether * lanes) {
    const ptrdiff_t count = std::min(kTogether, (width - b0) / lanes);
    Vector<T> total[kTogether] = {};
    for (ptrdiff_t begin = 0; begin < hidden; begin += kChunk) {
      Vector<T> partial[kTogether] = {};
      for (ptrdiff_t j = begin; j < std::min(hidden, begin + kChunk); ++j) {
        for (ptrdiff_t n = 0; n < count; ++n) partial[n] += part(j, b0 + n * lanes);
      }
      for (ptrdiff_t n = 0; n < count; ++n) total[n] += partial[n];
    }
    for (ptrdiff_t n = 0; n < count; ++n) store(to + b0 + n * lanes, total[n]);
  }
}

// The statistics of one slot at the current step. A unit has N rows: one per gate, or one for the
// cell.
template <typename T, int N>
class LayerNorm {
 public:
  LayerNorm(const Slot<T>& slot, const Share<T>& share)
      : slot(slot),
        H(share.H),
        W(share.W),
        is_first(share.units.begin == 0),
        rows(slot.layer ? 2 * share.W : 0) {}

  // Forward: the mean over a unit's rows, and the sum of squares about that mean.
  void put(ptrdiff_t j, const T* const (&y)[N]) {
    T *mean = part(0, j), *squares = part(1, j);
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      Vector<T> total = load(y[0] + b), around = zero<T>();
      for (int n = 1; n < N; ++n) total += load(y[n] + b);
      total *= static_cast<T>(1) / N;
      if (N > 1) {
        for (int n = 0; n < N; ++n) {
          const Vector<T> off = load(y[n] + b) - total;
          around += off * off;
        }
      }
      store(mean + b, total);
      store(squares + b, around);
    }
  }

  // After a barrier: mean and 1 / sqrt(var + eps) of all units' features.
  void find(ptrdiff_t t) {
    if (!slot.layer) return;
    T *mean = rows.data(), *rstd = mean + W;
    sum_units<T>(H, W, mean, [&](ptrdiff_t j, ptrdiff_t b) { return load(part(0, j) + b); });
    for (ptrdiff_t b = 0; b < W; ++b) mean[b] /= static_cast<T>(H);
    sum_units<T>(H, W, rstd, [&](ptrdiff_t j, ptrdiff_t b) {
      const Vector<T> off = load(part(0, j) + b) - load(mean + b);
      return load(part(1, j) + b) + static_cast<T>(N) * off * off;
    });
    for (ptrdiff_t b = 0; b < W; ++b) {
      rstd[b] = 1 / std::sqrt(rstd[b] / static_cast<T>(N * H) + slot.eps);
    }
    if (is_first && slot.of_steps != nullptr) {
      std::copy(rows.begin(), rows.end(), slot.of_steps + t * 2 * W);
    }
  }

  // Backward: read the statistics that the forward pass stored.
  void recall(ptrdiff_t t) {
    if (!slot.layer) return;
    std::copy_n(slot.of_steps + t * 2 * W, 2 * W, rows.begin());
  }

  Vector<T> normalized(Vector<T> y, ptrdiff_t b) const {
    return (y - load(rows.data() + b)) * load(rows.data() + W + b);
  }

  void normalize(T* y) const {
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) store(y + b, normalized(load(y + b), b));
  }

  // Backward: a unit's part of the sums of γ ∂ and γ ∂ ŷ, over its rows.
  void put_gradient(ptrdiff_t j, const T* const (&grad)[N], const T* const (&hat)[N],
                    const std::array<T, N>& gamma) {
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      Vector<T> total = zero<T>(), with_hat = zero<T>();
      for (int n = 0; n < N; ++n) {
        const Vector<T> scaled = load(grad[n] + b) * gamma[n];
        total += scaled;
        with_hat += scaled * load(hat[n] + b);
      }
      store(part(0, j) + b, total);
      store(part(1, j) + b, with_hat);
    }
  }

  // After a barrier: the means of γ ∂ and γ ∂ ŷ over all features.
  void find_gradient() {
    if (!slot.layer) return;
    means.resize(2 * W);
    for (int k = 0; k < 2; ++k) {
      T* const to = means.data() + k * W;
      sum_units<T>(H, W, to, [&](ptrdiff_t j, ptrdiff_t b) { return load(part(k, j) + b); });
      for (ptrdiff_t b = 0; b < W; ++b) to[b] /= static_cast<T>(N * H);
    }
  }

  // LN'(∂) = (γ ∂ - mean(γ ∂) - ŷ mean(γ ∂ ŷ)) / sqrt(var + eps), with means over the features.
  Vector<T> gradient(Vector<T> grad, Vector<T> hat, T gamma, ptrdiff_t b) const {
    const Vector<T> off = load(means.data() + b) + hat * load(means.data() + W + b);
    return (grad * gamma - off) * load(rows.data() + W + b);
  }

 private:
  T* part(int k, ptrdiff_t j) const { return slot.parts + (k * H + j) * W; }

  const Slot<T>& slot;
  const ptrdiff_t H, W;
  const bool is_first;  // whether this is the first thread
  Rows<T> rows;         // 2 (W,): mean, 1 / sqrt(var + eps)
  Rows<T> means;        // 2 (W,): means of γ ∂ and of γ ∂ ŷ
};

}  // namespace bnrnn
