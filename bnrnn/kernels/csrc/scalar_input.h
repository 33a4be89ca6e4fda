// An input of one feature, x_t. Row k of its term W_x x_t is w_k x_t, so no step computes these
// rows: with the mean m and the variance v of x_t over the batch, those of row k are w_k m and w_k²
// v, and
//
//   BN(w_k x_t) = γ_k a_k (x_t - m)       with a_k = w_k / sqrt(w_k² v + ε)
//   ∂γ_k = a_k q_k                        with q_k = Σ ∂z_k (x_t - m)
//   ∂w_k = γ_k q_k ε / (w_k² v + ε)^(3/2)
//
// With given statistics, or none, m is 0 here, and
//
//   BN(w_k x_t) = γ_k (a_k x_t + s_k)     with a_k = w_k r_k, s_k = -mean_k r_k, r_k the given
//   ∂γ_k = a_k q_k + s_k Σ ∂z_k           1 / sqrt(var_k + ε)
//   ∂w_k = γ_k q_k r_k
//
// With layer normalisation, the statistics of w_k x over the 4H rows are w x and σ² x², with the
// mean w and the variance σ² of W_x. With y = x / sqrt(σ² x² + ε),
//
//   LN(w_k x_t) = γ_k a_k y               with a_k = w_k - w
//   ∂γ_k = a_k q_k                        with q_k = Σ ∂z_k y
//   ∂a_k = γ_k q_k,  ∂σ² = -1/2 Σ_k γ_k a_k Σ ∂z_k y³
//   ∂w_k = ∂a_k - mean(∂a) + ∂σ² 2 a_k / 4H
#pragma once

#include <functional>
#include <utility>

#include "standards.h"

namespace bnrnn {

template <typename T>
class ScalarInput {
 public:
  explicit ScalarInput(const Share<T>& share)
      : share(share),
        p(share.p),
        given(p.narrow != nullptr && p.input_size == 1 && !p.sums),
        layer(given && p.ih.layer),
        of_weights(layer ? moments_of_weights(p) : std::pair<T, T>()),
        centred(given ? share.W : 0) {}

  // Whether the input has this form.
  bool is_given() const { return given; }

  // Prepare step t.
  void find(ptrdiff_t t) {
    if (!given) return;
    const T* const x = p.narrow + t * share.W;
    if (layer) {
      for (ptrdiff_t b = 0; b < share.W; b += kLanes<T>) {
        const Vector<T> y = load(x + b);
        store(row() + b, y / root<T>(y * y * of_weights.second + p.ih.eps));
      }
      return;
    }
    by_batch = p.ih.gamma != nullptr && p.ih.per_step && !share.is_lone(t);
    mean = by_batch ? share.mean_over_batch(t, [&](ptrdiff_t b) { return load(x + b); }) : 0;
    for (ptrdiff_t b = 0; b < share.W; b += kLanes<T>) store(row() + b, load(x + b) - mean);
    if (!by_batch) return;
    var = share.mean_over_batch(t, [&](ptrdiff_t b) { return load(row() + b) * load(row() + b); });
  }

  // x_t - m, or y with layer normalisation, (W,).
  T* row() { return centred.data(); }

  // Whether the statistics of the step are those of its batch.
  bool has_moments() const { return by_batch; }

  // Mean and variance of row k of the term.
  T mean_of(ptrdiff_t k) const { return p.weight_ih[k] * mean; }
  T var_of(ptrdiff_t k) const { return p.weight_ih[k] * p.weight_ih[k] * var; }

  // Replace the normalisation of the term by one of `row`.
  void apply_to(Standards<T, kGates>& x, Range group) {
    for (int gate = 0; gate < kGates; ++gate) {
      x.for_vectors(group, [&](ptrdiff_t u, int count) {
        const T* const weights = p.weight_ih + gate * share.H + group.begin + u;
        const Vector<T> w = load_first(weights, count) - of_weights.first;
        const Vector<T> r = load(x.rstd[gate] + u), scale = load(x.scale[gate] + u);
        store(a[gate] + u, w * r);
        store(s[gate] + u, by_batch ? zero<T>() : load(x.shift[gate] + u));
        store(of_weight[gate] + u, by_batch ? scale * (r * r * p.ih.eps) : scale);
        store(x.rstd[gate] + u, broadcast<T>(1)), store(x.shift[gate] + u, zero<T>());
        store(x.gamma[gate] + u, w * scale), store(x.scale[gate] + u, w * scale);
        if (by_batch) store(x.offset[gate] + u, zero<T>());
      });
    }
  }

  // Add the gradients of γ_k and w_k of a gate of unit u of the group, with `total` = Σ ∂z_k.
  void add_gradients(int gate, Range group, ptrdiff_t u, T total, T q) const {
    const ptrdiff_t k = gate * share.H + group.begin + u;
    if (p.ih.grad_gamma != nullptr) p.ih.grad_gamma[k] += a[gate][u] * q + s[gate][u] * total;
    if (p.grad_weight_ih != nullptr) p.grad_weight_ih[k] += of_weight[gate][u] * q;
  }

  // With layer normalisation: add each unit's part of -2 ∂σ². dz[gate] is the first unit's row;
  // those of the next units are `stride` elements further.
  void add_spread(Range group, const T* const (&dz)[kGates], ptrdiff_t stride,
                  const Standards<T, kGates>& x) const {
    if (!layer || p.grad_spread == nullptr) return;
    for (ptrdiff_t u = 0; u < group.size(); ++u) {
      Vector<T> total = zero<T>();
      for (ptrdiff_t b = 0; b < share.W; b += kLanes<T>) {
        Vector<T> of_y = zero<T>();
        for (int gate = 0; gate < kGates; ++gate) {
          of_y += load(dz[gate] + u * stride + b) * x.scale[gate][u];
        }
        const Vector<T> y = load(centred.data() + b);
        total += of_y * (y * y * y);
      }
      p.grad_spread[group.begin + u] += bnrnn::sum<T>(total);
    }
  }

  // With layer normalisation: turn the sums in grad_weight_ih, ∂a, into ∂w.
  static void complete_gradient(const Problem<T>& p) {
    if (p.grad_spread == nullptr || p.grad_weight_ih == nullptr) return;
    const ptrdiff_t rows = kGates * p.hidden;
    const T mean = moments_of_weights(p).first;
    const T of_mean = sum(p.grad_weight_ih, rows) / rows;
    const T of_var = sum(p.grad_spread, p.hidden) / -2;
    for (ptrdiff_t k = 0; k < rows; ++k) {
      p.grad_weight_ih[k] += of_var * 2 * (p.weight_ih[k] - mean) / rows - of_mean;
    }
  }

 private:
  template <typename Of = std::identity>
  static T sum(const T* terms, ptrdiff_t count, Of&& of = {}) {
    double total = 0;
    for (ptrdiff_t i = 0; i < count; ++i) total += of(terms[i]);
    return static_cast<T>(total);
  }

  static std::pair<T, T> moments_of_weights(const Problem<T>& p) {
    const ptrdiff_t rows = kGates * p.hidden;
    const T mean = sum(p.weight_ih, rows) / rows;
    return {mean, sum(p.weight_ih, rows, [=](T w) { return (w - mean) * (w - mean); }) / rows};
  }

  const Share<T>& share;
  const Problem<T>& p;
  const bool given, layer;
  const std::pair<T, T> of_weights;  // with layer normalisation: w and σ², else 0
  bool by_batch = false;
  T mean = 0, var = 0;
  Rows<T> centred;
  // Of the gates of a group's units: a_k, s_k, and ∂w_k / q_k.
  T a[kGates][kGroup], s[kGates][kGroup], of_weight[kGates][kGroup];
};

}  // namespace bnrnn
