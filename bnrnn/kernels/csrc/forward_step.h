// The forward pass of one time step, a group of units at a time: the elementwise parts and the
// statistics.
#pragma once

#include "step.h"

namespace bnrnn {

template <typename T, bool kGeneral>
class ForwardStep : public Step<T, kGeneral> {
 public:
  using Base = Step<T, kGeneral>;
  using Base::p, Base::H, Base::W, Base::state_at, Base::cell_at, Base::live_at, Base::counted_at;
  using Base::is_lone, Base::put_state, Base::row_of;
  using Base::scalar_input, Base::layer_ih, Base::layer_hh, Base::layer_c;

  ForwardStep(const Problem<T>& problem, int thread, int threads)
      : Base(problem, thread, threads, problem.sums && Base::has_input_product(problem)),
        output_gates(at_hand * W),
        new_cells(p.hold_cell.is_constant(0) ? 0 : at_hand * W) {
    recurrent_rows.resize(kGates * at_hand * W);
  }

  // The group's rows of W_x x_t.
  void input_product(ptrdiff_t t, Range group) {
    T* rows[kGates * kGroup];
    for_rows(group, [&](ptrdiff_t row, int gate, ptrdiff_t j) {
      rows[row] = p.sums ? recurrent_row(t, gate, j, group) : this->term_at(t, gate * H + j);
    });
    this->product(group, p.weight_ih, this->packed_ih, p.input_size, this->input_layout,
                  p.centres_input(), this->input_panel_at(t, p.input_size), rows, false);
  }

  // The group's rows of W_h h_{t-1}, added to the input term if `sums`.
  void recurrent_product(ptrdiff_t t, Range group) {
    T* rows[kGates * kGroup];
    for_rows(group, [&](ptrdiff_t row, int gate, ptrdiff_t j) {
      rows[row] = recurrent_row(t, gate, j, group);
    });
    const T* const state = this->panel_at(t, H);
    if (p.batch > 1) {
      this->product(group, p.weight_hh, this->packed, H, this->layout, p.centres_hidden(), state,
                    rows, p.sums);
      return;
    }
    for_rows(group, [&](ptrdiff_t row, int gate, ptrdiff_t j) {
      if (!p.sums) store(rows[row], zero<T>());
      rows[row][0] += dot(p.weight_hh + (gate * H + j) * H, state, H);
    });
  }

  // The group's part of the layer statistics of the two terms.
  void forward_parts(ptrdiff_t t, Range group) {
    T *x[kGates], *h[kGates];
    terms(t, group, group.begin, x, h);
    if (layer_ih.active) layer_ih.put(group, {x[0], x[1], x[2], x[3]});
    if (layer_hh.active) layer_hh.put(group, {h[0], h[1], h[2], h[3]});
  }

  // Compute the moments of the two terms.
  void forward_moments(ptrdiff_t t, Range group) {
    T *x[kGates], *h[kGates];
    for (ptrdiff_t j = group.begin; kGeneral && j < group.end; ++j) {
      terms(t, group, j, x, h);
      for (int gate = 0; gate < kGates; ++gate) {
        if (layer_ih.active) layer_ih.normalize(x[gate]);
        if (layer_hh.active) layer_hh.normalize(h[gate]);
      }
    }
    terms(t, group, group.begin, x, h);
    if (scalar_input.has_moments()) {
      for (int gate = 0; gate < kGates; ++gate) {
        for (ptrdiff_t k = gate * H + group.begin; k < gate * H + group.end; ++k) {
          p.ih.mean[t * kGates * H + k] = scalar_input.mean_of(k);
          p.ih.var[t * kGates * H + k] = scalar_input.var_of(k);
        }
      }
    } else {
      find_moments<kGates>(p.ih, t, group, {x[0], x[1], x[2], x[3]});
    }
    find_moments<kGates>(p.hh, t, group, {h[0], h[1], h[2], h[3]});
    find_standards(t, group);
  }

  // Compute the gates and c_t.
  void forward_cell(ptrdiff_t t, Range group) {
    for (ptrdiff_t j = group.begin; j < group.end; ++j) forward_cell(t, group, j);
    if (kGeneral && layer_c.active) layer_c.put(group, {new_cell(t, group.begin, group)});
  }

  // Compute the moments of the cell state.
  void forward_cell_moments(ptrdiff_t t, Range group) {
    find_moments<1>(p.c, t, group, {new_cell(t, group.begin, group)});
    of_c.find(p.c, t, group, H);
  }

  // Compute h_t.
  void forward_state(ptrdiff_t t, Range group) {
    for (ptrdiff_t j = group.begin; j < group.end; ++j) forward_state(t, group, j);
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
  using Base::terms, Base::rows_at, Base::activate, Base::beta_of, Base::row, Base::at_hand;
  using Base::recurrent_rows, Base::recurrent_row;
  using Base::find_standards, Base::of_x, Base::of_h, Base::of_c, Base::offset;

  // visit(row, gate, j) for the rows of a group, which are ordered by gate.
  template <typename Visit>
  static void for_rows(Range group, Visit&& visit) {
    for (ptrdiff_t row = 0; row < kGates * group.size(); ++row) {
      visit(row, static_cast<int>(row / group.size()), group.begin + row % group.size());
    }
  }

  void forward_cell(ptrdiff_t t, Range group, ptrdiff_t j) {
    const ptrdiff_t W = this->W, u = j - group.begin;
    T *x[kGates], *h[kGates];
    terms(t, group, j, x, h);
    const T *c_before = cell_at(t) + j * W, *live = live_at(t);
    T *const c_new = new_cell(t, j, group), *const c_after = cell_at(t + 1) + j * W;
    T* const output_gate = output_gate_row(j, group);
    T* const kept = p.keep ? this->recurrent_at(t) + j * W : nullptr;
    const FactorRow<T> candidate_factor = row_of(p.candidate_factor, t, j);
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      Vector<T> gates[kGates];
#pragma GCC unroll 4
      for (int gate = 0; gate < kGates; ++gate) {
        const Vector<T> of_hidden = load(h[gate] + b);
        if (kept != nullptr) stream(kept + gate * H * W + b, of_hidden);
        gates[gate] = load(x[gate] + b) * of_x.scale[gate][u] +
                      (of_hidden * of_h.scale[gate][u] + offset[gate][u]);
      }
      activate(gates);
      store(output_gate + b, gates[kOutput]);
      if (kGeneral) gates[kCandidate] *= candidate_factor(b);
      const Vector<T> before = load(c_before + b);
      const Vector<T> c = gates[kForget] * before + gates[kInput] * gates[kCandidate];
      const Integers<T> runs = load(live + b) != 0;
      store(c_new + b, runs ? c : before);
    }
    if (!kGeneral || c_new == c_after) return;
    const FactorRow<T> hold = row_of(p.hold_cell, t, j);
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      const Vector<T> before = load(c_before + b), kept = hold(b);
      const Integers<T> runs = load(live + b) != 0;
      store(c_after + b, runs ? kept * before + (1 - kept) * load(c_new + b) : before);
    }
  }

  void forward_state(ptrdiff_t t, Range group, ptrdiff_t j) {
    const ptrdiff_t W = this->W, u = j - group.begin;
    const T *c_new = new_cell(t, j, group), *o = output_gate_row(j, group), *live = live_at(t);
    const T scale = of_c.scale[0][u], added = of_c.offset[0][u] + beta_of(j);
    const T* h_before = state_at(t) + j * W;
    T* h_after = state_at(t + 1) + j * W;
    const FactorRow<T> hold = row_of(p.hold_hidden, t, j);
    const bool zoneout = kGeneral && !p.hold_hidden.is_constant(0),
               layer = kGeneral && layer_c.active;
    for_blocks<T>(W, [&](ptrdiff_t first, auto vectors) {
      Vector<T> squashed[vectors];
      for (int i = 0; i < vectors; ++i) {
        const ptrdiff_t b = first + i * kLanes<T>;
        const Vector<T> c = layer ? layer_c.normalized(load(c_new + b), b) : load(c_new + b);
        squashed[i] = c * scale + added;
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

  // The row of c̃_t; without zoneout it is that of c_t.
  T* new_cell(ptrdiff_t t, ptrdiff_t j, Range group) {
    if (!kGeneral || p.hold_cell.is_constant(0)) return cell_at(t + 1) + j * W;
    return new_cells.data() + row(j, group) * W;
  }

  T* output_gate_row(ptrdiff_t j, Range group) { return output_gates.data() + row(j, group) * W; }

  // Compute the moments of a slot's N rows per unit, one per gate or one for the cell, if this pass
  // finds them. y[n] is the first unit's; the rows of the next units follow it.
  template <int N>
  void find_moments(const Slot<T>& slot, ptrdiff_t t, Range group, const T* const (&y)[N]) const {
    if (slot.gamma == nullptr || !slot.per_step) return;
    for (int n = 0; n < N; ++n) {
      const ptrdiff_t i = (t * N + n) * H + group.begin;
      if (is_lone(t)) {
        std::copy_n(slot.mean + i - N * H, group.size(), slot.mean + i);
        std::copy_n(slot.var + i - N * H, group.size(), slot.var + i);
      } else {
        moments(t, y[n], group.size(), slot.mean + i, slot.var + i);
      }
    }
  }

  // Mean and variance of `count` rows (W,), one after another, over the counted sequences.
  void moments(ptrdiff_t t, const T* rows, ptrdiff_t count, T* mean, T* var) const {
    const T* const counted = counted_at(t);
    const T inverse = p.inverse_count[t * p.count_stride];
    // The vectors all of whose sequences count at every step.
    const ptrdiff_t whole = p.mask_stride == 0 ? p.batch / kLanes<T> * kLanes<T> : 0;
    const auto put_means = [&](T* to, auto&& of) {
      Vector<T> totals[kGroup] = {};
      for (ptrdiff_t u = 0; u < count; ++u) {
        const T* const y = rows + u * W;
        Vector<T> total = zero<T>();
        for (ptrdiff_t b = 0; b < whole; b += kLanes<T>) total += of(load(y + b), u);
        for (ptrdiff_t b = whole; b < W; b += kLanes<T>) {
          total += of(load(y + b), u) * load(counted + b);
        }
        totals[u] = total;
      }
      T sums[kGroup];
      sum<T>(totals, sums);
      for (ptrdiff_t u = 0; u < count; ++u) to[u] = sums[u] * inverse;
    };
    put_means(mean, [](Vector<T> y, ptrdiff_t) { return y; });
    put_means(var, [mean](Vector<T> y, ptrdiff_t u) { return (y - mean[u]) * (y - mean[u]); });
  }

  Rows<T> output_gates, new_cells;  // [unit][W]
};

}  // namespace bnrnn
