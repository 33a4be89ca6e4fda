// What both passes need in a time step: the input term, and the memory of the units.
#pragma once

#include "layer_norm.h"
#include "share.h"

namespace bnrnn {

// A step processes a unit in several parts. A run of a few units completes each part before the next,
// so that they stay in the first-level cache, and while one unit waits for its sums over the batch,
// the processor computes another. Layer normalisation needs statistics over all units of all threads,
// so the thread then completes each part for all its units before the next (`apart`).
//
// kGeneral: whether there may be layer normalisation or noise; otherwise their code is not compiled in.
template <typename T, bool kGeneral>
class Step : public Share<T> {
 public:
  using Share<T>::p, Share<T>::H, Share<T>::W, Share<T>::units;
  using Share<T>::recurrent_at, Share<T>::term_at;

  Step(const Problem<T>& problem, int thread, int threads)
      : Share<T>(problem, thread, threads),
        apart(has_layer(p)),
        units_per_run(units_of_run(W)),
        layer_ih(p.ih, *this),
        layer_hh(p.hh, *this),
        layer_c(p.c, *this),
        at_hand(apart ? units.size() : kGroup),
        units_held(apart ? units.size() : units_per_run) {
    input.resize(kGates * at_hand * W);
    unit.resize(units_held * kUnitArrays * W);
  }

  // Write the group's rows of W_x x_t to `input`, unless `input_product` computes them. If the sum
  // is normalised, write them to `recurrent` instead, where the product will be added; `input` stays
  // zero.
  void input_term(ptrdiff_t t, Range group) {
    if (this->has_input_product()) return;
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t first = gate * H + group.begin;
      T* const rows =
          p.sums ? recurrent_at(t) + first * W : input_row(gate, group.begin, group);
      if (p.lone_term != nullptr) {
        std::fill_n(rows, group.size() * W, T(0));
        const T* const term = p.lone_term + t * kGates * H + first;
        for (ptrdiff_t u = 0; u < group.size(); ++u) rows[u * W] = term[u];
        continue;
      }
      if (p.index != nullptr) {
        const int64_t* const symbols = p.index + t * p.batch;
        if (p.feature_stride == 1) {
          transpose_in<T>(
              group.size(), p.batch, W,
              [&](ptrdiff_t b) { return p.columns + symbols[b] * p.symbol_stride + first; },
              [&](ptrdiff_t u, ptrdiff_t b, Vector<T> term) { store(rows + u * W + b, term); });
          continue;
        }
        for (ptrdiff_t u = 0; u < group.size(); ++u) {
          const T* const weights = p.columns + (first + u) * p.feature_stride;
          T* const row = rows + u * W;
          for (ptrdiff_t b = 0; b < p.batch; ++b) row[b] = weights[symbols[b]];
          std::fill(row + p.batch, row + W, T(0));
        }
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

  // Visit the runs of a group.
  template <typename Visit>
  void for_runs(Range group, Visit&& visit) const {
    for (ptrdiff_t first = group.begin; first < group.end; first += units_per_run) {
      visit(Range{first, std::min(first + units_per_run, group.end)});
    }
  }

  // Whether there is dropout of h_{t-1} within the product.
  bool drops_hidden() const { return kGeneral && Share<T>::drops_hidden(); }

  const bool apart;
  const ptrdiff_t units_per_run;  // a power of two, of which kGroup is a multiple
  LayerNorm<T, kGates> layer_ih, layer_hh;
  LayerNorm<T, 1> layer_c;

 protected:
  // The rows (W,) that a unit keeps between the parts of a step; the gates come first.
  enum { kOfZ = kGates, kHiddenHat = kOfZ + kGates, kOfY = kHiddenHat + kGates, kCellHat,
         kNewCell = kOfY, kUnitArrays = kCellHat + 1 };
  // What is the same for all sequences of unit j at step t.
  struct Constants {
    Constants() = default;
    Constants(const Step& step, ptrdiff_t t, ptrdiff_t j) {
      for (int gate = 0; gate < kGates; ++gate) {
        const ptrdiff_t k = gate * step.H + j;
        x[gate] = standard_at(step.p.ih, t, k, kGates * step.H);
        h[gate] = standard_at(step.p.hh, t, k, kGates * step.H);
        bias[gate] = step.p.bias == nullptr ? 0 : step.p.bias[k];
      }
    }
    Standard<T> x[kGates], h[kGates];
    Standard<T> c;  // in the backward pass: the forward pass finds its moments after the gates
    T bias[kGates];
  };

  // As many units as keep their rows within half of a first-level cache of 32 KB.
  static ptrdiff_t units_of_run(ptrdiff_t width) {
    ptrdiff_t units = kGroup;
    while (units > 1 && units * kUnitArrays * width * sizeof(T) > (1 << 14)) units /= 2;
    return units;
  }

  // The place of unit j among those that keep their rows: all of the thread if `apart`, else a run.
  ptrdiff_t place(ptrdiff_t j) const {
    return apart ? j - units.begin : (j - units.begin) & (units_per_run - 1);
  }

  T* array(ptrdiff_t j, int i) { return unit.data() + (place(j) * kUnitArrays + i) * W; }

  T beta_of(ptrdiff_t j) const { return p.beta_c == nullptr ? 0 : p.beta_c[j]; }

  // Replace the arguments of the gates by the gates: tanh(z_g), and sigmoid of the others.
  static BNRNN_INLINE void activate(Vector<T> (&z)[kGates]) {
    z[kCandidate] = twice_for_tanh<T>(z[kCandidate]);
    exp_minus_1<T>(z);
#pragma GCC unroll 4
    for (int gate = 0; gate < kGates; ++gate) {
      z[gate] = (gate == kCandidate ? z[gate] : z[gate] + 1) / (z[gate] + 2);
    }
  }

  // The index of unit j among the units held: those of the thread if `apart`, else of the group.
  ptrdiff_t row(ptrdiff_t j, Range group) const { return j - (apart ? units.begin : group.begin); }

  T* input_row(int gate, ptrdiff_t j, Range group) {
    return input.data() + (gate * at_hand + row(j, group)) * W;
  }

  // The rows of the two terms of unit j, one per gate.
  void terms(ptrdiff_t t, Range group, ptrdiff_t j, T* (&x)[kGates], T* (&h)[kGates]) {
    for (int gate = 0; gate < kGates; ++gate) {
      x[gate] = p.term != nullptr ? term_at(t, gate * H + j) : input_row(gate, j, group);
      h[gate] = recurrent_at(t) + (gate * H + j) * W;
    }
  }

  // The vectors of contiguous rows (W,).
  auto rows_at(const T* rows) const {
    return [rows, W = W](ptrdiff_t u, ptrdiff_t b) { return load(rows + u * W + b); };
  }

  const ptrdiff_t at_hand;     // number of units that have a row of `input`: see `row`
  const ptrdiff_t units_held;  // number of units that keep their rows: see `place`
  // W_x x_t, in the backward pass then its normalised values, and then their gradient.
  Rows<T> input;  // [gate][unit][W]

 private:
  Rows<T> unit;  // [unit][kUnitArrays][W]
};

}  // namespace bnrnn
