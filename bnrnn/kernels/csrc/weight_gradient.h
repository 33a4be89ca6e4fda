// The gradient of a weight W in y_t = W x_t, where x_t is h_{t-1} or the input of step t: the sum
// over t of (gradient of y_t) x_t^T.
#pragma once

#include <vector>

#include "bf16_gradient.h"
#include "share.h"

namespace bnrnn {

// Computes the rows of the thread's units, one block of steps at a time, while their gradients are
// in the cache. The right operand, the x_t of a block, is the same for all threads: each writes
// some of its columns.
//   panel_at(t)                  the panel that has the gradient of y_t, see products.h
//   put(t, column, count, put)   calls put(b, u, vector) with vectors of x_t[b], of which the first
//                                begins at this column; `count` elements are wanted
template <typename T, typename PanelAt, typename Put>
class WeightGradient {
 public:
  // `to` is (4H, columns), with columns rounded up to whole vectors. If it is null, nothing is
  // done. `right` has two blocks of right_size elements: a fast thread may write the next block
  // while a slow one still reads this one. `panel_layout` is that of the panels. `bf16` has the
  // gradient of y_t in bfloat16 if `bf16.wanted`.
  WeightGradient(const Share<T>& share, ptrdiff_t columns, T* to, T* right,
                 const RightLayout<T>& panel_layout, const Bf16Gradient<T>& bf16, PanelAt panel_at,
                 Put put)
      : share(share),
        p(share.p),
        H(share.H),
        W(share.W),
        columns(columns),
        width(ceil_div(columns, kLanes<T>) * kLanes<T>),
        own(part({0, width / kLanes<T>}, share.threads, share.thread)),
        to(to),
        right(right),
        panel_layout(panel_layout),
        layout(width, bf16.wanted ? kLanes<T> : columns - (width - kLanes<T>)),
        bf16(bf16),
        panel_at(panel_at),
        put_columns(put) {}

  // Write the thread's columns of x_t. After the first step of a block, a barrier must precede
  // `add`.
  void put(ptrdiff_t t) {
    if (to == nullptr) return;
    const Range steps = block_of(t);
    T* const block = right_of(steps);
    layout.for_chunks([&](ptrdiff_t column, ptrdiff_t across) {
      const ptrdiff_t begin = std::max(column, own.begin * kLanes<T>);
      const ptrdiff_t end = std::min({column + across, own.end * kLanes<T>, columns});
      if (begin >= end) return;
      if (bf16.wanted) {
        put_columns(t, begin, end - begin, [&](ptrdiff_t b, ptrdiff_t u, Vector<T> x) {
          put_bf16_right<T>(bf16_right_at(as_bf16(block), bf16.blocks(), bf16.at(t, b), begin + u),
                            b, x);
        });
        return;
      }
      // [chunk of columns][t, last step first][b][column]. Columns beyond the last only add to
      // columns that nobody reads.
      T* const rows = block + column * steps.size() * p.batch +
                      (steps.end - 1 - t) * p.batch * across + begin - column;
      put_columns(t, begin, end - begin, [&](ptrdiff_t b, ptrdiff_t u, Vector<T> x) {
        store_first(rows + b * across + u, x, static_cast<int>(across));
      });
    });
  }

  // Add a block of steps once step t, its first, is done; otherwise do nothing.
  void add(ptrdiff_t t) {
    const Range steps = block_of(t);
    if (to == nullptr || t != steps.begin) return;
    if (bf16.wanted) return add_bf16(steps);
    find_lefts(steps);
    constexpr ptrdiff_t kRows = 240;  // whole tiles
    for (int gate = 0; gate < kGates; ++gate) {
      const Range features = {gate * H + share.units.begin, gate * H + share.units.end};
      for (ptrdiff_t r = features.begin; r < features.end; r += kRows) {
        add_rows({r, std::min(r + kRows, features.end)}, steps);
      }
    }
  }

 private:
  // The block that contains step t.
  Range block_of(ptrdiff_t t) const {
    const ptrdiff_t most = steps_per_block(p.batch), begin = t / most * most;
    return {begin, std::min(begin + most, p.steps)};
  }

  T* right_of(Range steps) const {
    const bool odd = steps.begin / steps_per_block(p.batch) % 2;
    return right + (odd ? right_size(p.batch, columns, bf16.wanted) : 0);
  }

  void add_bf16(Range steps) {
    const Bf16* const pairs = as_bf16(right_of(steps));
    share.for_groups([&](Range group) {
      Bf16Tile tiles[kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        T* const rows = to + (gate * H + group.begin) * width;
        tiles[gate] = {bf16.tile(group, gate), reinterpret_cast<float*>(rows), width, group.size()};
      }
      bf16_product(tiles, kGates, bf16.blocks(steps.size()), pairs, bf16.blocks(),
                   width / kLanes<float>, steps.end < p.steps);
    });
  }

  // The left operands of a block are the columns of its panels, last step first, without padding.
  void find_lefts(Range steps) {
    lefts.clear();
    for (ptrdiff_t t = steps.end - 1; t >= steps.begin; --t) {
      const T* const panel = panel_at(t);
      panel_layout.for_chunks([&](ptrdiff_t column, ptrdiff_t across) {
        const ptrdiff_t depth = std::min(across, p.batch - column);
        lefts.push_back(contiguous_left(panel + column * kGates * H, across, depth, kTileRows));
      });
    }
  }

  void add_rows(Range rows, Range steps) const {
    const T* b = right_of(steps);
    layout.for_chunks([&](ptrdiff_t column, ptrdiff_t across) {
      for (size_t first = 0; first < lefts.size();) {
        // As many as keep the right operand in the cache.
        ptrdiff_t depth = lefts[first].depth;
        size_t next = first + 1;
        while (next < lefts.size() && depth + lefts[next].depth <= kDepth) {
          depth += lefts[next++].depth;
        }
        const bool add = steps.end < p.steps || first > 0;
        const Left<T>* const from = lefts.data() + first;
        const ptrdiff_t count = next - first;
        column < layout.whole ? add_tiles(from, count, rows, b, depth, column, across, add)
                              : add_tail(from, count, rows, b, add);
        b += depth * across;
        first = next;
      }
    });
  }

  void add_tiles(const Left<T>* from, ptrdiff_t count, Range rows, const T* b, ptrdiff_t depth,
                 ptrdiff_t column, ptrdiff_t across, bool add) const {
    const int vectors = static_cast<int>(across / kLanes<T>);
    const T* ahead = b + depth * across;  // the next part, which other processors may have
    // Tiles of nearly equal height: one of few rows has too few sums to add to.
    const ptrdiff_t tiles = ceil_div(rows.size(), layout.tile_rows);
    for (ptrdiff_t i = 0; i < tiles; ++i) {
      const Range tile = part(rows, tiles, i);
      T* c[kTallRows<T>];
      for (ptrdiff_t r = tile.begin; r < tile.end; ++r) c[r - tile.begin] = to + r * width;
      for (ptrdiff_t r = tile.end; r < std::min(tile.end + layout.tile_rows, rows.end); ++r) {
        prefetch<true>(to + r * width + column, across);  // of the next tile
      }
      tile_of<T>(static_cast<int>(tile.size()), vectors)(from, count, tile.begin, b, c, column, add,
                                                         i < vectors ? ahead : b);
      ahead += depth * kLanes<T>;
    }
  }

  void add_tail(const Left<T>* from, ptrdiff_t count, Range rows, const T* b, bool add) const {
    ptrdiff_t r = rows.begin;
    const auto add_some = [&](int tile_rows, int tiles) {
      const ptrdiff_t height = tile_rows * tiles;
      for (; r + height <= rows.end; r += height) {
        T* c[2 * kTileRows];
        for (ptrdiff_t i = 0; i < height; ++i) c[i] = to + (r + i) * width;
        tail_product_of<T>(layout.together, tile_rows, tiles)(from, count, r, b, c, layout.whole,
                                                              height, add);
      }
    };
    add_some(kTileRows, 2);
    add_some(kTileRows, 1);
    add_some(1, 1);
  }

  const Share<T>& share;
  const Problem<T>& p;
  const ptrdiff_t H, W, columns, width;
  const Range own;  // vectors of columns
  T *const to, *const right;
  const RightLayout<T>& panel_layout;
  const RightLayout<T> layout;  // of `right`
  const Bf16Gradient<T>& bf16;
  const PanelAt panel_at;
  Put put_columns;
  std::vector<Left<T>> lefts;
};

// Of W_h, with h_{t-1} as it enters the product, after dropout.
template <typename T>
auto recurrent_weight_gradient(const Share<T>& share, const Bf16Gradient<T>& bf16) {
  return WeightGradient(
      share, share.H, share.p.grad_weight_hh, share.p.right_hh, share.layout, bf16,
      [&](ptrdiff_t t) { return share.panel_at(t, kGates * share.H); },
      [&share, mean = Rows<T>(share.H)](ptrdiff_t t, ptrdiff_t column, ptrdiff_t count,
                                        auto&& put) mutable {
        const bool centres = share.p.centres_hidden() && !share.is_lone(t);
        for (ptrdiff_t j = column; j < column + count; ++j) {
          mean[j] = !centres ? 0 : share.mean_over_batch(t, [&](ptrdiff_t b) {
            return share.state_in_product(t, j, b);
          });
        }
        transpose_out<T>(
            count, share.p.batch,
            [&](ptrdiff_t u, ptrdiff_t b) {
              return share.state_in_product(t, column + u, b) - mean[column + u];
            },
            [&](ptrdiff_t b, ptrdiff_t u, int, Vector<T> h) { put(b, u, h); });
      });
}

// Of W_x, for a dense input.
template <typename T>
auto input_weight_gradient(const Share<T>& share, const Bf16Gradient<T>& bf16) {
  const Problem<T>& p = share.p;
  return WeightGradient(
      share, p.input_size, p.dense == nullptr ? nullptr : p.grad_weight_ih, p.right_ih,
      share.input_layout, bf16,
      [&](ptrdiff_t t) { return share.input_panel_at(t, kGates * share.H); },
      [&share, &p](ptrdiff_t t, ptrdiff_t column, ptrdiff_t count, auto&& put) {
        const auto x_at = [&](ptrdiff_t b, ptrdiff_t u) {
          const T* const x = p.dense + (t * p.batch + b) * p.input_size + column;
          return load_first(x + u, static_cast<int>(count - u));
        };
        const bool centres = p.centres_input() && !share.is_lone(t);
        const T* const counted = share.counted_at(t);
        for (ptrdiff_t u = 0; u < count; u += kLanes<T>) {
          Vector<T> mean = zero<T>();
          for (ptrdiff_t b = 0; centres && b < p.batch; ++b) mean += x_at(b, u) * counted[b];
          mean *= p.inverse_count[t * p.count_stride];
          for (ptrdiff_t b = 0; b < p.batch; ++b) put(b, u, x_at(b, u) - mean);
        }
      });
}

}  // namespace bnrnn
