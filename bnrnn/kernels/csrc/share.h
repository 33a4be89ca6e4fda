// A thread's share of the problem: a range of hidden units, with all four gates of each and the
// whole batch.
#pragma once

#include <algorithm>
#include <cmath>

#include "products.h"
#include "profile.h"
#include "recurrence.h"
#include "transpose.h"

namespace bnrnn {

enum Gate { kInput, kForget, kCandidate, kOutput, kGates };
constexpr ptrdiff_t kGroup = 16;  // hidden units processed together

// The number of steps between two updates of the gradient of W_h in the backward pass. A product
// over this many steps amortises loading and storing the result, and its operands fit the cache.
inline ptrdiff_t steps_a_block(ptrdiff_t batch) {
  constexpr ptrdiff_t kRows = 512;
  return std::max<ptrdiff_t>(1, kRows / batch);
}

// BN(y; gamma, 0) = (y - mean) * rstd * gamma.
template <typename T>
struct Standard {
  T mean = 0, rstd = 1, gamma = 1;
  T scale() const { return rstd * gamma; }
};

template <typename T>
BNRNN_INLINE Standard<T> standard_at(const Slot<T>& slot, ptrdiff_t t, ptrdiff_t feature,
                        ptrdiff_t features) {
  if (slot.gamma == nullptr) return {};
  if (slot.layer) return {0, 1, slot.gamma[feature]};  // the term is normalised already
  const ptrdiff_t i = std::min(t, slot.rows - 1) * features + feature;
  return {slot.mean[i], 1 / std::sqrt(slot.var[i] + slot.eps), slot.gamma[feature]};
}

// The number of rows of H elements that a thread with `units` units needs for its packed part of
// W_h. Tiles are padded at the end of each group in the forward pass, and at the end of the
// thread's units in the backward pass.
inline ptrdiff_t packed_rows(ptrdiff_t units) {
  return kGates * units + (ceil_div(units, kGroup) + kGates) * kTileRows;
}

// The values of a `Factor` for one unit at one step.
template <typename T>
struct FactorRow {
  const uint8_t* mask;
  ptrdiff_t batch;
  T yes, no;

  // The factors of the sequences from b on.
  Vector<T> operator()(ptrdiff_t b) const {
    if (mask == nullptr) return broadcast(no);
    const Integers<T> marked = widened<T>(mask + b, static_cast<int>(batch - b));
    return marked != 0 ? broadcast(yes) : broadcast(no);
  }
};

template <typename T>
bool has_layer(const Problem<T>& p) {
  return p.ih.layer || p.hh.layer || p.c.layer;
}

template <typename T>
bool has_noise(const Problem<T>& p) {
  return !(p.hold_cell.is_constant(0) && p.hold_hidden.is_constant(0) &&
           p.candidate_factor.is_constant(1) && p.hidden_factor.is_constant(1));
}

template <typename T>
struct Share {
  Share(const Problem<T>& problem, int thread, int threads)
      : p(problem),
        H(p.hidden),
        W(p.width),
        units(part({0, H}, threads, thread)),
        inputs(part({0, p.input_size}, threads, thread)),
        layout(W),
        packed(p.packed + thread * packed_rows(ceil_div(H, threads)) * H),
        packed_ih(p.packed_ih) {
    if (packed_ih == nullptr) return;
    packed_ih += thread * (p.grad_input == nullptr
                               ? packed_rows(ceil_div(H, threads)) * p.input_size
                               : packed_rows(ceil_div(p.input_size, threads)) * H);
  }

  FactorRow<T> row_of(const Factor<T>& factor, ptrdiff_t t, ptrdiff_t j) const {
    const uint8_t* const row =
        factor.mask == nullptr ? nullptr : factor.mask + t * factor.stride + j * p.batch;
    return {row, p.batch, factor.yes, factor.no};
  }

  // Whether there is dropout of h_{t-1} within the product.
  bool drops_hidden() const { return !p.hidden_factor.is_constant(1); }

  T* recurrent_at(ptrdiff_t t) const { return p.recurrent + (p.keep ? t * kGates * H * W : 0); }
  T* state_at(ptrdiff_t t) const { return p.states + (p.keep ? t : t % 2) * H * W; }
  T* cell_at(ptrdiff_t t) const { return p.cells + (p.keep ? t * H * W : 0); }
  const T* live_at(ptrdiff_t t) const { return p.live + t * p.mask_stride; }
  const T* counted_at(ptrdiff_t t) const { return p.counted + t * p.mask_stride; }

  // A lone sequence has no variance: it uses the statistics of the previous step as constants.
  bool is_lone(ptrdiff_t t) const {
    return t > 0 && p.count_stride != 0 && p.inverse_count[t] == 1;
  }

  // The right operand of the product of step t. There are at least two: a fast thread may write
  // that of the next step while a slow thread still reads that of this step.
  T* panel_at(ptrdiff_t t, ptrdiff_t depth) const { return p.panels + t % p.panel_count * depth * W; }

  T* input_panel_at(ptrdiff_t t, ptrdiff_t depth) const {
    return p.input_panels + t % p.input_panel_count * depth * W;
  }

  // Whether the forward pass multiplies W_x by a dense input.
  bool has_input_product() const { return p.dense != nullptr && p.lone_term == nullptr; }

  // Row (W,) of the W_x x_t that is kept.
  T* term_at(ptrdiff_t t, ptrdiff_t feature) const {
    return p.term + t * p.term_stride + feature * W;
  }

  // Write the thread's part of x_t to its panel.
  void put_input(ptrdiff_t t) const {
    if (t == p.steps || !has_input_product()) return;
    T* const panel = input_panel_at(t, p.input_size);
    transpose_in<T>(
        inputs.size(), p.batch, W,
        [&](ptrdiff_t b) { return p.dense + (t * p.batch + b) * p.input_size + inputs.begin; },
        [&](ptrdiff_t d, ptrdiff_t b, Vector<T> x) {
          store(layout.at(panel, p.input_size, inputs.begin + d, b), x);
        });
  }

  // Whether the forward pass packs the weights. Packing takes longer than it saves in two steps.
  bool packs() const { return p.steps > 2; }

  // rows (+)= the group's rows of `weight` (4H, depth) times `right`; `packed` is the packed form of
  // these rows, which is used if the forward pass packs.
  void product(
      Range group, const T* weight, const T* packed, ptrdiff_t depth, const T* right, T* const* rows,
      bool add) const {
    const ptrdiff_t n = group.size();
    if (packs()) {
      packed_product(packed, kGates * n, depth, right, W, rows, add);
      return;
    }
    for (int gate = 0; gate < kGates; ++gate) {
      plain_product(
          weight + (gate * H + group.begin) * depth, n, depth, right, W, rows + gate * n, add);
    }
  }

  // The group's rows of W_x x_t. `panel` is that of the group's rows of W_h, see `for_groups`.
  void input_product(ptrdiff_t t, Range group, const T* panel) const {
    T* rows[kGates * kGroup];
    for (ptrdiff_t row = 0; row < kGates * group.size(); ++row) {
      rows[row] = p.sums ? recurrent_at(t) + feature(group, row) * W : term_at(t, feature(group, row));
    }
    product(group, p.weight_ih, packed_ih + (panel - packed) / H * p.input_size, p.input_size,
            input_panel_at(t, p.input_size), rows, false);
  }

  // The group's rows of W_h h_{t-1}, added to the input term if the sum is normalised.
  void recurrent_product(ptrdiff_t t, Range group, const T* panel) const {
    T* rows[kGates * kGroup];
    for (ptrdiff_t row = 0; row < kGates * group.size(); ++row) {
      rows[row] = recurrent_at(t) + feature(group, row) * W;
    }
    if (p.batch > 1) {
      product(group, p.weight_hh, panel, H, panel_at(t, H), rows, p.sums);
      return;
    }
    for (ptrdiff_t row = 0; row < kGates * group.size(); ++row) {
      if (!p.sums) store(rows[row], zero<T>());
      rows[row][0] += dot(p.weight_hh + feature(group, row) * H, panel_at(t, H), H);
    }
  }

  // h_{t-1} of unit j as it enters the product, after dropout.
  Vector<T> state_in_product(ptrdiff_t t, ptrdiff_t j, ptrdiff_t b) const {
    const Vector<T> h = load(state_at(t) + j * W + b);
    return drops_hidden() ? h * row_of(p.hidden_factor, t, j)(b) : h;
  }

  void put_state(ptrdiff_t t, ptrdiff_t j) const {
    if (p.batch == 1) {
      panel_at(t, H)[j] = state_in_product(t, j, 0)[0];
      return;
    }
    T* const panel = panel_at(t, H);
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      store(layout.at(panel, H, j, b), state_in_product(t, j, b));
    }
  }

  // The feature (of 4H) that a row of a group holds; the rows are ordered by gate.
  ptrdiff_t feature(Range group, ptrdiff_t row) const {
    return row / group.size() * H + group.begin + row % group.size();
  }

  template <typename Visit>
  void for_groups(Visit&& visit) const {
    T* panel = packed;
    const ptrdiff_t groups = ceil_div(units.size(), kGroup);
    for (ptrdiff_t i = 0; i < groups; ++i) {
      const ptrdiff_t first = units.begin + i * kGroup;
      const Range group = {first, std::min(first + kGroup, units.end)};
      visit(group, panel);
      panel += whole_tiles(kGates * group.size()) * H;
    }
  }

  // visit(group, j) for each unit.
  template <typename Visit>
  void for_units(Visit&& visit) const {
    for_groups([&](Range group, T*) {
      for (ptrdiff_t j = group.begin; j < group.end; ++j) visit(group, j);
    });
  }

  const Problem<T>& p;
  const ptrdiff_t H, W;
  const Range units;
  const Range inputs;           // of the D features of a dense input
  const RightLayout<T> layout;  // of the panels
  T* const packed;  // this thread's part of W_h
  T* packed_ih;     // of W_x, or in the backward pass of its transpose
  [[no_unique_address]] Laps laps;
};

}  // namespace bnrnn
