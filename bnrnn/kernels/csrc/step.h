// What both passes need in a time step: the input term, and the memory of the units.
#pragma once

#include "functions.h"
#include "layer_norm.h"
#include "one_hot_input.h"
#include "scalar_input.h"
#include "share.h"

namespace bnrnn {

// A step processes a group of units in several parts, each for all its units before the next: their
// sums over the batch and their statistics are then vectors of units, and while one unit waits for
// a result, the processor computes another. Layer normalisation needs statistics over all units of
// all threads, so the thread then completes each part for all its groups before the next (`apart`).
//
// kGeneral: whether there may be layer normalisation or noise; otherwise their code is not compiled
// in.
template <typename T, bool kGeneral>
class Step : public Share<T> {
 public:
  using Share<T>::p, Share<T>::H, Share<T>::W, Share<T>::units;
  using Share<T>::recurrent_at, Share<T>::term_at;

  // If `ahead`, the input term of all units is computed at once, into the rows of all units.
  Step(const Problem<T>& problem, int thread, int threads, bool ahead)
      : Share<T>(problem, thread, threads),
        apart(has_layer(p)),
        holds_all(apart || ahead),
        scalar_input(*this),
        one_hot_input(*this),
        layer_ih(p.ih, *this, p.ih.layer && !scalar_input.is_given()),
        layer_hh(p.hh, *this, p.hh.layer),
        layer_c(p.c, *this, p.c.layer),
        at_hand(holds_all ? units.size() : kGroup),
        zeros(p.sums ? W : 0) {
    input.resize(kGates * at_hand * W);
  }

  // Write the group's rows of W_x x_t to `input`, unless they are not needed or `input_product`
  // computes them. If `sums`, write them to `recurrent_rows` instead, where the product will be
  // added.
  void input_term(ptrdiff_t t, Range group) {
    if (this->has_input_product() || scalar_input.is_given()) return;
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t first = gate * H + group.begin;
      T* const rows =
          p.sums ? recurrent_row(t, gate, group.begin, group) : input_row(gate, group.begin, group);
      if (p.lone_term != nullptr) {
        std::fill_n(rows, group.size() * W, T(0));
        const T* const term = p.lone_term + t * kGates * H + first;
        for (ptrdiff_t u = 0; u < group.size(); ++u) rows[u * W] = term[u];
        continue;
      }
      if (p.index != nullptr) {
        one_hot_input.put_rows(t, gate, group, rows);
        continue;
      }
      const T* x = p.narrow + t * p.input_size * W;
      for (ptrdiff_t u = 0; u < group.size(); ++u) {
        const T* weights = p.weight_ih + (first + u) * p.input_size;
        T* row = rows + u * W;
        for (ptrdiff_t b = 0; b < W; b += kLanes<T>) store(row + b, load(x + b) * weights[0]);
        for (ptrdiff_t d = 1; d < p.input_size; ++d) {
          for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
            store(row + b, load(row + b) + load(x + d * W + b) * weights[d]);
          }
        }
      }
    }
  }

  // Whether there is dropout of h_{t-1} within the product.
  bool drops_hidden() const { return kGeneral && Share<T>::drops_hidden(); }

  const bool apart;
  const bool holds_all;  // whether all units of the thread have rows at hand, or only a group's
  ScalarInput<T> scalar_input;
  OneHotInput<T> one_hot_input;
  LayerNorm<T, kGates> layer_ih, layer_hh;
  LayerNorm<T, 1> layer_c;

 protected:
  // Find how the two terms of a group's units are normalised at step t, once their moments are
  // known.
  void find_standards(ptrdiff_t t, Range group) {
    of_x.find(p.ih, t, group, H);
    of_h.find(p.hh, t, group, H);
    if (scalar_input.is_given()) scalar_input.apply_to(of_x, group);
    for (int gate = 0; gate < kGates; ++gate) {
      of_x.for_vectors(group, [&](ptrdiff_t u, int count) {
        const ptrdiff_t k = gate * H + group.begin + u;
        const Vector<T> b = p.bias == nullptr ? zero<T>() : load_first(p.bias + k, count);
        store(offset[gate] + u, load(of_x.offset[gate] + u) + load(of_h.offset[gate] + u) + b);
      });
    }
  }

  T beta_of(ptrdiff_t j) const { return p.beta_c == nullptr ? 0 : p.beta_c[j]; }

  // Replace the arguments of the gates by the gates: tanh(z_g), and sigmoid of the others.
  static BNRNN_INLINE void activate(Vector<T> (&z)[kGates]) { sigmoid_and_tanh<T, kCandidate>(z); }

  // The index of unit j among the units held: those of the thread, or of the group.
  ptrdiff_t row(ptrdiff_t j, Range group) const {
    return j - (holds_all ? units.begin : group.begin);
  }

  T* input_row(int gate, ptrdiff_t j, Range group) {
    return input.data() + (gate * at_hand + row(j, group)) * W;
  }

  // The rows of the two terms of unit j, one per gate. If `sums`, the second is the sum of both.
  void terms(ptrdiff_t t, Range group, ptrdiff_t j, T* (&x)[kGates], T* (&h)[kGates]) {
    for (int gate = 0; gate < kGates; ++gate) {
      x[gate] = p.sums                    ? zeros.data()
                : p.term != nullptr       ? term_at(t, gate * H + j)
                : scalar_input.is_given() ? scalar_input.row()
                                          : input_row(gate, j, group);
      h[gate] = recurrent_row(t, gate, j, group);
    }
  }

  // The row of W_h h_{t-1} of unit j.
  T* recurrent_row(ptrdiff_t t, int gate, ptrdiff_t j, Range group) {
    if (recurrent_rows.empty()) return recurrent_at(t) + (gate * H + j) * W;
    return recurrent_rows.data() + (gate * at_hand + row(j, group)) * W;
  }

  // The vectors of contiguous rows (W,).
  auto rows_at(const T* rows) const {
    return [rows, W = W](ptrdiff_t u, ptrdiff_t b) { return load(rows + u * W + b); };
  }

  const ptrdiff_t at_hand;  // number of units that have a row of `input`: see `row`
  // W_x x_t, in the backward pass then its gradient.
  Rows<T> input;  // [gate][unit][W]
  Rows<T> zeros;  // (W,), if `sums`
  // W_h h_{t-1} in the forward pass, `recurrent` in the backward pass.
  Rows<T> recurrent_rows;  // [gate][unit][W]
  // Of a group's units; `offset` is added to the scaled terms, and includes the bias.
  Standards<T, kGates> of_x, of_h;
  Standards<T, 1> of_c;
  T offset[kGates][kGroup];
};

}  // namespace bnrnn
