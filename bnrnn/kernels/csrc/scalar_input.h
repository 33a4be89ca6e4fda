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
#pragma once

#include "standards.h"

namespace bnrnn {

template <typename T>
class ScalarInput {
 public:
  explicit ScalarInput(const Share<T>& share)
      : share(share),
        p(share.p),
        given(p.narrow != nullptr && p.input_size == 1 && !p.sums && !p.ih.layer),
        centred(given ? share.W : 0) {}

  // Whether the input has this form.
  bool is_given() const { return given; }

  // Prepare step t.
  void find(ptrdiff_t t) {
    if (!given) return;
    const T* const x = p.narrow + t * share.W;
    by_batch = p.ih.gamma != nullptr && p.ih.per_step && !share.is_lone(t);
    mean = by_batch ? share.mean_over_batch(t, [&](ptrdiff_t b) { return load(x + b); }) : 0;
    for (ptrdiff_t b = 0; b < share.W; b += kLanes<T>) store(row() + b, load(x + b) - mean);
    if (!by_batch) return;
    var = share.mean_over_batch(t, [&](ptrdiff_t b) { return load(row() + b) * load(row() + b); });
  }

  // x_t - m, (W,).
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
        const Vector<T> w = load_first(p.weight_ih + gate * share.H + group.begin + u, count);
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

 private:
  const Share<T>& share;
  const Problem<T>& p;
  const bool given;
  bool by_batch = false;
  T mean = 0, var = 0;
  Rows<T> centred;
  // Of the gates of a group's units: a_k, s_k, and ∂w_k / q_k.
  T a[kGates][kGroup], s[kGates][kGroup], of_weight[kGates][kGroup];
};

}  // namespace bnrnn
