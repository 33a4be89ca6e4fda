// Layer normalisation: mean and variance over the features of each sequence separately. Each thread
// writes sums over every few of its units, a part, to memory that all threads can read. After a
// barrier, each thread sums all parts, in the same order.
#pragma once

#include "share.h"

namespace bnrnn {

// to[b] = finish(sum of part(i, b) over all i). Partial sums keep rounding errors of long sums
// small.
template <typename T, typename Part, typename Finish>
void sum_parts(ptrdiff_t parts, ptrdiff_t width, T* to, Part&& part, Finish&& finish) {
  constexpr ptrdiff_t kChunk = 32;
  for_blocks<T>(width, [&](ptrdiff_t first, auto vectors) {
    Vector<T> total[vectors] = {};
    for (ptrdiff_t begin = 0; begin < parts; begin += kChunk) {
      Vector<T> partial[vectors] = {};
      for (ptrdiff_t i = begin; i < std::min(parts, begin + kChunk); ++i) {
        for (int n = 0; n < vectors; ++n) partial[n] += part(i, first + n * kLanes<T>);
      }
      for (int n = 0; n < vectors; ++n) total[n] += partial[n];
    }
    for (int n = 0; n < vectors; ++n) store(to + first + n * kLanes<T>, finish(total[n]));
  });
}

// The statistics of one slot at the current step. A unit has N rows: one per gate, or one for the
// cell.
template <typename T, int N>
class LayerNorm {
 public:
  LayerNorm(const Slot<T>& slot, const Share<T>& share, bool active)
      : active(active),
        slot(slot),
        H(share.H),
        W(share.W),
        is_first(share.thread == 0),
        rows(active ? 2 * share.W : 0) {}

  // Forward: of each part of a group's units, the mean over their rows, and the sum of squares
  // about it. y[n] is the first unit's row; the rows of the next units follow it.
  void put(Range group, const T* const (&y)[N]) {
    for_parts(group, [&](ptrdiff_t i, ptrdiff_t u, ptrdiff_t units) {
      const T inverse = 1 / static_cast<T>(N * units);
      for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
        Vector<T> total = zero<T>(), around = zero<T>();
        for (int n = 0; n < N; ++n) {
          for (ptrdiff_t k = 0; k < units; ++k) total += load(y[n] + (u + k) * W + b);
        }
        const Vector<T> mean = total * inverse;
        for (int n = 0; n < N; ++n) {
          for (ptrdiff_t k = 0; k < units; ++k) {
            const Vector<T> off = load(y[n] + (u + k) * W + b) - mean;
            around += off * off;
          }
        }
        store(part(0, i) + b, mean);
        store(part(1, i) + b, around);
      }
    });
  }

  // After a barrier: mean and 1 / sqrt(var + eps) of all units' features.
  void find(ptrdiff_t t) {
    if (!active) return;
    T *mean = rows.data(), *rstd = mean + W;
    const T units = static_cast<T>(H), features = N * units;
    sum_parts<T>(
        parts(), W, mean,
        [&](ptrdiff_t i, ptrdiff_t b) { return load(part(0, i) + b) * units_of(i); },
        [=](Vector<T> total) { return total / units; });
    sum_parts<T>(
        parts(), W, rstd,
        [&](ptrdiff_t i, ptrdiff_t b) {
          const Vector<T> off = load(part(0, i) + b) - load(mean + b);
          return load(part(1, i) + b) + N * units_of(i) * off * off;
        },
        [=, eps = slot.eps](Vector<T> total) { return 1 / root<T>(total / features + eps); });
    if (is_first && slot.of_steps != nullptr) {
      std::copy(rows.begin(), rows.end(), slot.of_steps + t * 2 * W);
    }
  }

  // Backward: read the statistics that the forward pass stored.
  void recall(ptrdiff_t t) {
    if (!active) return;
    std::copy_n(slot.of_steps + t * 2 * W, 2 * W, rows.begin());
  }

  Vector<T> normalized(Vector<T> y, ptrdiff_t b) const {
    return (y - load(rows.data() + b)) * load(rows.data() + W + b);
  }

  void normalize(T* y) const {
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) store(y + b, normalized(load(y + b), b));
  }

  // Backward: of each part of a group's units, the sums of γ ∂ and γ ∂ ŷ over their rows. grad[n]
  // and hat[n] are the first unit's rows; those of the next units are grad_stride and hat_stride
  // elements further.
  void put_gradient(Range group, const T* const (&grad)[N], ptrdiff_t grad_stride,
                    const T* const (&hat)[N], ptrdiff_t hat_stride, const T (&gamma)[N][kGroup]) {
    for_parts(group, [&](ptrdiff_t i, ptrdiff_t u, ptrdiff_t units) {
      for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
        Vector<T> total = zero<T>(), with_hat = zero<T>();
        for (int n = 0; n < N; ++n) {
          for (ptrdiff_t k = u; k < u + units; ++k) {
            const Vector<T> scaled = load(grad[n] + k * grad_stride + b) * gamma[n][k];
            total += scaled;
            with_hat += scaled * load(hat[n] + k * hat_stride + b);
          }
        }
        store(part(0, i) + b, total);
        store(part(1, i) + b, with_hat);
      }
    });
  }

  // After a barrier: the means of γ ∂ and γ ∂ ŷ over all features.
  void find_gradient() {
    if (!active) return;
    means.resize(2 * W);
    const T features = static_cast<T>(N * H);
    for (int k = 0; k < 2; ++k) {
      sum_parts<T>(
          parts(), W, means.data() + k * W,
          [&](ptrdiff_t i, ptrdiff_t b) { return load(part(k, i) + b); },
          [=](Vector<T> total) { return total / features; });
    }
  }

  // LN'(∂) = (γ ∂ - mean(γ ∂) - ŷ mean(γ ∂ ŷ)) / sqrt(var + eps), with means over the features.
  Vector<T> gradient(Vector<T> grad, Vector<T> hat, T gamma, ptrdiff_t b) const {
    const Vector<T> off = load(means.data() + b) + hat * load(means.data() + W + b);
    return (grad * gamma - off) * load(rows.data() + W + b);
  }

  const bool active;  // whether the slot has layer normalisation that this class computes

 private:
  ptrdiff_t parts() const { return layer_parts(H); }

  T* part(int k, ptrdiff_t i) const { return slot.parts + (k * parts() + i) * W; }

  T units_of(ptrdiff_t i) const { return static_cast<T>(std::min(kLayerPart, H - i * kLayerPart)); }

  // visit(part, first unit within the group, number of units) for the parts of a group.
  template <typename Visit>
  static void for_parts(Range group, Visit&& visit) {
    for (ptrdiff_t u = 0; u < group.size(); u += kLayerPart) {
      visit((group.begin + u) / kLayerPart, u, std::min(kLayerPart, group.size() - u));
    }
  }

  const Slot<T>& slot;
  const ptrdiff_t H, W;
  const bool is_first;  // whether this is the first thread
  Rows<T> rows;         // 2 (W,): mean, 1 / sqrt(var + eps)
  Rows<T> means;        // 2 (W,): means of γ ∂ and of γ ∂ ŷ
};

}  // namespace bnrnn
