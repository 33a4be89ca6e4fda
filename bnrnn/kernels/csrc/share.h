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
inline ptrdiff_t steps_per_block(ptrdiff_t batch) {
  constexpr ptrdiff_t kRows = 512;
  return std::max<ptrdiff_t>(1, kRows / batch);
}

// The number of elements that a thread with `units` units needs for its packed rows (depth,) of a
// weight: four for each unit in the forward pass, one in the backward pass. Tiles are padded at the
// end of each group in the forward pass, and at the end of the thread's units in the backward pass.
inline ptrdiff_t packed_part(ptrdiff_t units, ptrdiff_t depth, bool bf16) {
  const ptrdiff_t groups = ceil_div(units, kGroup);
  if (bf16) return groups * kGates * bf16_blocks(depth) * kBf16Block / 2;
  constexpr ptrdiff_t kMostRows = kTallRows<float>;  // of a tile
  return (kGates * units + (groups + kGates) * kMostRows) * whole_runs(depth);
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

// The number of units that must belong to one thread.
template <typename T>
ptrdiff_t units_together(const Problem<T>& p) {
  return has_layer(p) ? kLayerPart : 1;
}

// The units of a thread.
template <typename T>
Range units_of(const Problem<T>& p, int threads, int thread) {
  const ptrdiff_t together = units_together(p);
  const Range range = part({0, ceil_div(p.hidden, together)}, threads, thread);
  return {range.begin * together, std::min(range.end * together, p.hidden)};
}

// The largest number of units of a thread.
template <typename T>
ptrdiff_t most_units(const Problem<T>& p, int threads) {
  const ptrdiff_t together = units_together(p);
  return ceil_div(ceil_div(p.hidden, together), threads) * together;
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
        thread(thread),
        threads(threads),
        H(p.hidden),
        W(p.width),
        units(units_of(p, threads, thread)),
        inputs(part({0, p.input_size}, threads, thread)),
        layout(W, last_columns(p), p.bf16),
        input_layout(W, last_input_columns(p), p.bf16_input()),
        packed(p.packed + thread * packed_part(most_units(p, threads), H, p.bf16)),
        packed_ih(p.packed_ih) {
    if (packed_ih == nullptr) return;
    packed_ih += thread * (p.grad_input == nullptr
                               ? packed_part(most_units(p, threads), p.input_size, p.bf16_input())
                               : packed_part(ceil_div(p.input_size, threads), H, p.bf16_input()));
  }

  FactorRow<T> row_of(const Factor<T>& factor, ptrdiff_t t, ptrdiff_t j) const {
    const uint8_t* const row =
        factor.mask == nullptr ? nullptr : factor.mask + t * factor.stride + j * p.batch;
    return {row, p.batch, factor.yes, factor.no};
  }

  // Whether there is dropout of h_{t-1} within the product.
  bool drops_hidden() const { return !p.hidden_factor.is_constant(1); }

  T* recurrent_at(ptrdiff_t t) const { return p.recurrent + t * kGates * H * W; }
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
  T* panel_at(ptrdiff_t t, ptrdiff_t depth) const {
    return p.panels + t % p.panel_count * panel_size(depth, p.panel_width, p.bf16);
  }

  T* input_panel_at(ptrdiff_t t, ptrdiff_t depth) const {
    return p.input_panels +
           t % p.input_panel_count * panel_size(depth, p.panel_width, p.bf16_input());
  }

  // Whether the forward pass multiplies W_x by a dense input.
  static bool has_input_product(const Problem<T>& p) {
    return p.dense != nullptr && p.lone_term == nullptr;
  }
  bool has_input_product() const { return has_input_product(p); }

  // Row (W,) of the W_x x_t that is kept.
  T* term_at(ptrdiff_t t, ptrdiff_t feature) const {
    return p.term + t * p.term_stride + feature * W;
  }

  // Write the thread's part of x_t to its panel.
  void put_input(ptrdiff_t t) {
    if (t >= p.steps || !has_input_product()) return;
    T* const panel = input_panel_at(t, p.input_size);
    const bool centres = p.centres_input();
    if (centres) input_rows.resize(inputs.size() * W);
    transpose_in<T>(
        inputs.size(), p.batch, W,
        [&](ptrdiff_t b) { return p.dense + (t * p.batch + b) * p.input_size + inputs.begin; },
        [&](ptrdiff_t d, ptrdiff_t b, Vector<T> x) {
          if (centres) return store(input_rows.data() + d * W + b, x);
          input_layout.put(panel, p.input_size, inputs.begin + d, b, x);
        });
    for (ptrdiff_t d = 0; centres && d < inputs.size(); ++d) {
      put_centred(panel, p.input_size, inputs.begin + d, t,
                  [&](ptrdiff_t b) { return load(input_rows.data() + d * W + b); });
    }
  }

  // The mean of a row (W,) over the sequences that count at step t.
  template <typename At>
  T mean_over_batch(ptrdiff_t t, At&& at) const {
    Vector<T> total = zero<T>();
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) total += at(b) * load(counted_at(t) + b);
    return sum<T>(total) * p.inverse_count[t * p.count_stride];
  }

  // Write row k of a right operand in bfloat16, for step t: see Problem::centres_hidden.
  template <typename At>
  void put_centred(T* panel, ptrdiff_t depth, ptrdiff_t k, ptrdiff_t t, At&& at) const {
    const T mean = mean_over_batch(t, at);
    Bf16* const of_mean = bf16_right_at(as_bf16(panel), bf16_blocks(depth), k, W);
    put_bf16_split(of_mean, k, static_cast<float>(mean));
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      put_bf16_right<T>(bf16_right_at(as_bf16(panel), bf16_blocks(depth), k, b), k, at(b) - mean);
    }
  }

  // Whether the forward pass packs the weights. Packing takes longer than it saves in two steps.
  static bool packs(const Problem<T>& p) { return p.steps > 2; }
  bool packs() const { return packs(p); }

  // The sequences of the last vector of a panel. Products with weights that are not packed do
  // without a tail.
  static ptrdiff_t last_columns(const Problem<T>& p) {
    return packs(p) ? p.batch - (p.width - kLanes<T>) : kLanes<T>;
  }

  // Of the panels of x_t or, in the backward pass, of the gradient of W_x x_t. sequence_gradient
  // does without a tail, and so does a narrow input, which the forward pass also gets as a dense
  // one, if it has a gradient: the sums have the same bits.
  static ptrdiff_t last_input_columns(const Problem<T>& p) {
    const bool narrow = p.grad_state == nullptr && p.input_size <= kNarrow;
    return p.whole_sequence || narrow ? kLanes<T> : last_columns(p);
  }

  // The group's part of the thread's packed rows (depth,) of a weight; every earlier group has
  // kGroup units.
  T* packed_of(T* packed, Range group, ptrdiff_t depth, const RightLayout<T>& layout) const {
    const ptrdiff_t groups = (group.begin - units.begin) / kGroup;
    const ptrdiff_t whole =
        layout.bf16 ? kGates * bf16_blocks(depth) * kBf16Block / 2
                    : whole_tiles(kGates * kGroup, layout.tile_rows) * whole_runs(depth);
    return packed + groups * whole;
  }

  // Add the product with the sum of the two columns after the batch, times factor_of(b).
  template <typename FactorOf>
  void add_product_of_mean(const Bf16Tile* tiles, ptrdiff_t count, ptrdiff_t blocks,
                           const Bf16* right, FactorOf&& factor_of) const {
    constexpr ptrdiff_t lanes = kLanes<float>;
    const Bf16* const columns = right + W * blocks * kBf16Depth;
    for (ptrdiff_t i = 0; i < count; i += 2) {  // two tiles are multiplied at once
      float of_mean[2][kBf16Rows][lanes];
      const ptrdiff_t together = std::min<ptrdiff_t>(2, count - i);
      Bf16Tile means[2];
      for (ptrdiff_t n = 0; n < together; ++n) {
        means[n] = {tiles[i + n].left, of_mean[n][0], lanes, tiles[i + n].rows};
      }
      bf16_product(means, together, blocks, columns, blocks, 1, false);
      for (ptrdiff_t n = 0; n < together; ++n) {
        for (ptrdiff_t r = 0; r < means[n].rows; ++r) {
          const T mean = of_mean[n][r][0] + of_mean[n][r][1];
          T* const row = reinterpret_cast<T*>(tiles[i + n].c) + r * tiles[i + n].stride;
          for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
            store(row + b, load(row + b) + mean * factor_of(b));
          }
        }
      }
    }
  }

  // Tile i of packed rows (depth,), for the rows (W,) of a result that follow one another.
  Bf16Tile bf16_tile(const T* packed, ptrdiff_t i, ptrdiff_t depth, T* result,
                     ptrdiff_t rows) const {
    const Bf16* const left = as_bf16(packed) + i * bf16_blocks(depth) * kBf16Block;
    return {left, reinterpret_cast<float*>(result), W, rows};
  }

  // rows (+)= the group's rows of `weight` (4H, depth) times `right`; `packed` is the packed form
  // of the thread's rows, which is used if the forward pass packs.
  void product(Range group, const T* weight, T* packed, ptrdiff_t depth,
               const RightLayout<T>& layout, bool centred, const T* right, T* const* rows,
               bool add) const {
    const ptrdiff_t n = group.size();
    if (packs()) {
      T* const of_group = packed_of(packed, group, depth, layout);
      if (!layout.bf16)
        return packed_product(of_group, kGates * n, depth, right, layout, rows, add);
      Bf16Tile tiles[kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        tiles[gate] = bf16_tile(of_group, gate, depth, rows[gate * n], n);
      }
      const ptrdiff_t blocks = bf16_blocks(depth);
      bf16_product(tiles, kGates, blocks, as_bf16(right), blocks, W / kLanes<float>, add);
      if (centred) {
        add_product_of_mean(tiles, kGates, blocks, as_bf16(right),
                            [](ptrdiff_t) { return broadcast<T>(1); });
      }
      return;
    }
    for (int gate = 0; gate < kGates; ++gate) {
      plain_product(weight + (gate * H + group.begin) * depth, n, depth, right, W, rows + gate * n,
                    add);
    }
  }

  // Pack the columns `range` of a weight (4H, columns), as rows of its transpose, for a product
  // with a right operand of this layout.
  void pack_transposed(const T* weight, ptrdiff_t columns, Range range, T* packed,
                       const RightLayout<T>& layout) const {
    const auto at = [&](ptrdiff_t row, ptrdiff_t k) {
      return weight[k * columns + range.begin + row];
    };
    layout.bf16 ? pack_bf16(as_bf16(packed), range.size(), kGates * H, at)
                : pack(packed, range.size(), kGates * H, layout.tile_rows, at);
  }

  // Rows (W,) at `result`, one after another, (+)= the rows that pack_transposed packed times
  // `right`, the panel of step t.
  void transposed_product(ptrdiff_t t, const T* packed, const RightLayout<T>& layout, bool centred,
                          const T* right, ptrdiff_t rows, T* result, bool add) {
    const ptrdiff_t depth = kGates * H;
    if (!layout.bf16) {
      result_rows.resize(rows);
      for (ptrdiff_t i = 0; i < rows; ++i) result_rows[i] = result + i * W;
      return packed_product(packed, rows, depth, right, layout, result_rows.data(), add);
    }
    bf16_tiles.clear();
    for (ptrdiff_t i = 0; i * kBf16Rows < rows; ++i) {
      bf16_tiles.push_back(bf16_tile(packed, i, depth, result + i * kBf16Rows * W,
                                     std::min(kBf16Rows, rows - i * kBf16Rows)));
    }
    const ptrdiff_t count = bf16_tiles.size(), blocks = bf16_blocks(depth);
    bf16_product(bf16_tiles.data(), count, blocks, as_bf16(right), blocks, W / kLanes<float>, add);
    if (!centred) return;
    add_product_of_mean(bf16_tiles.data(), count, blocks, as_bf16(right),
                        [&](ptrdiff_t b) { return -load(counted_at(t) + b); });
  }

  // h_{t-1} of unit j as it enters the product, after dropout.
  Vector<T> state_in_product(ptrdiff_t t, ptrdiff_t j, ptrdiff_t b) const {
    const Vector<T> h = load(state_at(t) + j * W + b);
    return drops_hidden() ? h * row_of(p.hidden_factor, t, j)(b) : h;
  }

  // Write the row of unit j in the panel of step t.
  void put_state(ptrdiff_t t, ptrdiff_t j) const {
    if (t == p.steps) return;
    if (p.batch == 1) {
      panel_at(t, H)[j] = state_in_product(t, j, 0)[0];
      return;
    }
    T* const panel = panel_at(t, H);
    if (p.centres_hidden()) {
      return put_centred(panel, H, j, t, [&](ptrdiff_t b) { return state_in_product(t, j, b); });
    }
    const auto state_at = [&](ptrdiff_t b) { return state_in_product(t, j, b); };
    if (!p.bf16) return layout.put_row(panel, H, j, state_at);
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) layout.put(panel, H, j, b, state_at(b));
  }

  // The feature (of 4H) that a row of a group holds; the rows are ordered by gate.
  ptrdiff_t feature(Range group, ptrdiff_t row) const {
    return row / group.size() * H + group.begin + row % group.size();
  }

  template <typename Visit>
  void for_groups(Visit&& visit) const {
    for (ptrdiff_t first = units.begin; first < units.end; first += kGroup) {
      visit(Range{first, std::min(first + kGroup, units.end)});
    }
  }

  const Problem<T>& p;
  const int thread, threads;
  const ptrdiff_t H, W;
  const Range units;
  const Range inputs;                         // of the D features of a dense input
  const RightLayout<T> layout, input_layout;  // of the panels
  T* const packed;                            // this thread's part of W_h
  T* packed_ih;                               // of W_x, or in the backward pass of its transpose
  Rows<T> input_rows;                         // of put_input
  std::vector<T*> result_rows;                // of transposed_product
  std::vector<Bf16Tile> bf16_tiles;           // likewise
  [[no_unique_address]] Laps laps;
};

}  // namespace bnrnn
