// The forward pass of one time step: the elementwise parts and the statistics, unit by unit.
#pragma once

#include "step.h"

namespace bnrnn {

template <typename T, bool kGeneral>
class ForwardStep : public Step<T, kGeneral> {
 public:
  using Base = Step<T, kGeneral>;
  using Base::Base;
  using Base::p, Base::H, Base::W, Base::state_at, Base::cell_at, Base::live_at, Base::counted_at;
  using Base::is_lone, Base::put_state, Base::row_of;
  using Base::layer_ih, Base::layer_hh, Base::layer_c;

  // Unit j's part of the layer statistics of the two terms.
  void forward_parts(ptrdiff_t t, Range group, ptrdiff_t j) {
    T *x[kGates], *h[kGates];
    terms(t, group, j, x, h);
    if (p.ih.layer) layer_ih.put(j, {x[0], x[1], x[2], x[3]});
    if (p.hh.layer) layer_hh.put(j, {h[0], h[1], h[2], h[3]});
  }

  // Compute the moments of the two terms of unit j.
  void forward_moments(ptrdiff_t t, Range group, ptrdiff_t j) {
    T *x[kGates], *h[kGates];
    terms(t, group, j, x, h);
    for (int gate = 0; gate < kGates; ++gate) {
      if (kGeneral && p.ih.layer) layer_ih.normalize(x[gate]);
      if (kGeneral && p.hh.layer) layer_hh.normalize(h[gate]);
    }
    find_moments(t, j, x, h);
  }

  // Compute the gates and c_t of unit j.
  void forward_cell(ptrdiff_t t, Range group, ptrdiff_t j) {
    const ptrdiff_t W = this->W;
    T *x[kGates], *h[kGates];
    terms(t, group, j, x, h);
    const Constants of(*this, t, j);
    const T *c_before = cell_at(t) + j * W, *live = live_at(t);
    T *const c_new = new_cell(t, j), *const c_after = cell_at(t + 1) + j * W;
    T* const output_gate = array(j, kOutput);
    const FactorRow<T> candidate_factor = row_of(p.candidate_factor, t, j);
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      Vector<T> gates[kGates];
#pragma GCC unroll 4
      for (int gate = 0; gate < kGates; ++gate) {
        gates[gate] = (load(x[gate] + b) - of.x[gate].mean) * of.x[gate].scale() +
                      (load(h[gate] + b) - of.h[gate].mean) * of.h[gate].scale() + of.bias[gate];
      }
      activate(gates);
      store(output_gate + b, gates[kOutput]);
      if (kGeneral) gates[kCandidate] *= candidate_factor(b);
      const Vector<T> before = load(c_before + b);
      const Vector<T> c = gates[kForget] * before + gates[kInput] * gates[kCandidate];
      const Integers<T> runs = load(live + b) != 0;
      store(c_new + b, runs ? c : before);
    }
    if (!kGeneral) return;
    if (p.c.layer) layer_c.put(j, {c_new});
    if (c_new == c_after) return;
    const FactorRow<T> hold = row_of(p.hold_cell, t, j);
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      const Vector<T> before = load(c_before + b), kept = hold(b);
      const Integers<T> runs = load(live + b) != 0;
      store(c_after + b, runs ? kept * before + (1 - kept) * load(c_new + b) : before);
    }
  }

  // Compute the moments of the cell state of unit j.
  void forward_cell_moments(ptrdiff_t t, ptrdiff_t j) {
    find_moments<1>(p.c, t, j, {new_cell(t, j)});
  }

  // Compute h_t of unit j.
  void forward_state(ptrdiff_t t, ptrdiff_t j) {
    const ptrdiff_t W = this->W;
    const T *c_new = new_cell(t, j), *o = array(j, kOutput), *live = live_at(t);
    const Standard<T> of_c = standard_at(p.c, t, j, H);
    const T beta = beta_of(j);
    const T* h_before = state_at(t) + j * W;
    T* h_after = state_at(t + 1) + j * W;
    const FactorRow<T> hold = row_of(p.hold_hidden, t, j);
    const bool zoneout = kGeneral && !p.hold_hidden.is_constant(0), layer = kGeneral && p.c.layer;
    for_blocks<T>(W, [&](ptrdiff_t first, auto vectors) {
      Vector<T> squashed[vectors];
      for (int i = 0; i < vectors; ++i) {
        const ptrdiff_t b = first + i * kLanes<T>;
        const Vector<T> c = layer ? layer_c.normalized(load(c_new + b), b) : load(c_new + b);
        squashed[i] = (c - of_c.mean) * of_c.scale() + beta;
      }
      tanh<T>(squashed);
      for (int i = 0; i < vectors; ++i) {
        const ptrdiff_t b = first + i * kLanes<T>;
        const Vector<T> before = load(h_before + b);
        Vector<T> h = load(o + b) * squashed[i];
        if (zoneout) {
          const Vector<T> kept = hold(b);
          h = kept * before + (1 - kept) * h;
        }
        const Integers<T> runs = load(live + b) != 0;
        store(h_after + b, runs ? h : before);
      }
    });
    put_state(t + 1, j);
  }

  // Write h_t of the group to the output.
  void put_output(ptrdiff_t t, Range group) {
    const T* live = live_at(t);
    transpose_out<T>(group.size(), p.batch, rows_at(state_at(t + 1) + group.begin * W),
              [&](ptrdiff_t b, ptrdiff_t u0, int n, Vector<T> h) {
                T* to = p.output + (t * p.batch + b) * H + group.begin + u0;
                store_first(to, live[b] != 0 ? h : zero<T>(), n);
              });
  }

 private:
  using typename Base::Constants;
  using Base::array, Base::terms, Base::rows_at, Base::activate, Base::beta_of, Base::kNewCell;

  // The row of c̃_t; without zoneout it is that of c_t.
  T* new_cell(ptrdiff_t t, ptrdiff_t j) {
    return !kGeneral || p.hold_cell.is_constant(0) ? cell_at(t + 1) + j * W : array(j, kNewCell);
  }

  // Whether this pass computes the slot's statistics.
  bool finds(const Slot<T>& slot) const { return slot.gamma != nullptr && slot.per_step; }

  // The moments of the two terms of unit j.
  void find_moments(ptrdiff_t t, ptrdiff_t j, T* const (&x)[kGates], T* const (&h)[kGates]) const {
    constexpr int N = 2 * kGates;
    if (finds(p.ih) && finds(p.hh) && !is_lone(t)) {
      T mean[N], var[N];
      moments<N>(t, {x[0], x[1], x[2], x[3], h[0], h[1], h[2], h[3]}, mean, var);
      put_moments<kGates>(p.ih, t, j, mean, var);
      put_moments<kGates>(p.hh, t, j, mean + kGates, var + kGates);
    } else {
      find_moments<kGates>(p.ih, t, j, {x[0], x[1], x[2], x[3]});
      find_moments<kGates>(p.hh, t, j, {h[0], h[1], h[2], h[3]});
    }
  }

  // The moments of the N rows of unit j in a slot (one per gate, or one for the cell), if this pass
  // computes them.
  template <int N>
  void find_moments(const Slot<T>& slot, ptrdiff_t t, ptrdiff_t j, const T* const (&y)[N]) const {
    if (!finds(slot)) return;
    if (is_lone(t)) {
      for (int n = 0; n < N; ++n) {
        const ptrdiff_t i = (t * N + n) * H + j;
        slot.mean[i] = slot.mean[i - N * H];
        slot.var[i] = slot.var[i - N * H];
      }
      return;
    }
    T mean[N], var[N];
    moments<N>(t, y, mean, var);
    put_moments<N>(slot, t, j, mean, var);
  }

  template <int N>
  void put_moments(const Slot<T>& slot, ptrdiff_t t, ptrdiff_t j, const T* mean, const T* var) const {
    for (int n = 0; n < N; ++n) {
      slot.mean[(t * N + n) * H + j] = mean[n];
      slot.var[(t * N + n) * H + j] = var[n];
    }
  }

  // Mean and variance of rows y (W,) over the counted sequences. One loop handles all rows, because
  // a single sum would be limited by the latency of its additions.
  template <int N>
  void moments(ptrdiff_t t, const T* const (&y)[N], T (&mean)[N], T (&var)[N]) const {
    const T* const counted = counted_at(t);
    const T inverse = p.inverse_count[t * p.count_stride];
    Vector<T> totals[N] = {}, squares[N] = {};
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) totals[n] += load(y[n] + b) * load(counted + b);
    }
    sum<T>(totals, mean);
    for (int n = 0; n < N; ++n) mean[n] *= inverse;
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Vector<T> off = (load(y[n] + b) - mean[n]) * load(counted + b);
        squares[n] += off * off;
      }
    }
    sum<T>(squares, var);
    for (int n = 0; n < N; ++n) var[n] *= inverse;
  }
};

}  // namespace bnrnn
