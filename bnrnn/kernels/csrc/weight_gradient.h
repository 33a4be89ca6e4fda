// The gradient of W_h: the sum over t of (gradient of W_h h_{t-1}) h_{t-1}^T, where h_{t-1} is that
// of the product, after dropout.
#pragma once

#include <vector>

#include "share.h"
#include "transpose.h"

namespace bnrnn {

// Computes the rows of the thread's units, one block of steps at a time, while their gradients are
// in the cache.
template <typename T>
class WeightGradient {
 public:
  explicit WeightGradient(const Share<T>& share)
      : share(share),
        p(share.p),
        H(share.H),
        W(share.W),
        width(p.grad_weight_columns),
        states(steps_a_block(p.batch) * p.batch * width) {}

  // Add a block of steps once step t, its first, is done; otherwise do nothing.
  void add(ptrdiff_t t) {
    const ptrdiff_t most = steps_a_block(p.batch);
    if (t % most != 0) return;
    const Range steps = {t, std::min(t + most, p.steps)};
    transpose_states(steps);
    find_pieces(steps);
    constexpr ptrdiff_t kRows = 60;  // whole tiles whose operands stay in the cache
    for (int gate = 0; gate < kGates; ++gate) {
      const Range features = {gate * H + share.units.begin, gate * H + share.units.end};
      for (ptrdiff_t r = features.begin; r < features.end; r += kRows) {
        add_rows({r, std::min(r + kRows, features.end)}, steps);
      }
    }
  }

 private:
  // Some columns of the gradient of W_h h_{t-1} at one step: row r is at a + r * a_row.
  struct Piece {
    const T* a;
    ptrdiff_t a_row, depth, before;  // number of columns, in this piece and in all before it
  };

  // The columns of a block are those of the panels, last step first, without the padding.
  void find_pieces(Range steps) {
    pieces.clear();
    ptrdiff_t before = 0;
    for (ptrdiff_t t = steps.end - 1; t >= steps.begin; --t) {
      const T* const panel = share.panel_at(t, kGates * H);
      for_column_chunks<T>(W, [&](ptrdiff_t column, int vectors) {
        const ptrdiff_t across = vectors * kLanes<T>, depth = std::min(across, p.batch - column);
        pieces.push_back({panel + column * kGates * H, across, depth, before});
        before += depth;
      });
    }
  }

  void add_rows(Range rows, Range steps) {
    const ptrdiff_t depth = steps.size() * p.batch;
    for_column_chunks<T>(width, [&](ptrdiff_t column, int vectors) {
      const ptrdiff_t across = vectors * kLanes<T>;
      const T* const right = states.data() + column * depth;
      for (size_t first = 0, next; first < pieces.size(); first = next) {
        // As many pieces as stay in the cache.
        for (next = first + 1; next < pieces.size(); ++next) {
          if (pieces[next].before + pieces[next].depth - pieces[first].before > kDepth) break;
        }
        for (ptrdiff_t r = rows.begin; r < rows.end; r += kTileRows) {
          segments.clear();
          for (size_t i = first; i < next; ++i) {
            const Piece& of = pieces[i];
            segments.push_back(
                {of.a + r * of.a_row, right + of.before * across, of.a_row, 1, across, of.depth});
          }
          const int count = static_cast<int>(std::min<ptrdiff_t>(kTileRows, rows.end - r));
          T* c[kTileRows];
          for (int i = 0; i < count; ++i) c[i] = p.grad_weight_hh + (r + i) * width;
          tile_of<T>(count, vectors)(
              segments.data(), segments.size(), c, column, steps.end < p.steps || first > 0);
        }
      }
    });
  }

  // Store h_{t-1} as the right operand: [chunk of columns][t, last step first][b][unit]. What is
  // beyond H only adds to columns that nobody reads.
  void transpose_states(Range steps) {
    T* panel = states.data();
    for_column_chunks<T>(width, [&](ptrdiff_t column, int vectors) {
      const ptrdiff_t across = vectors * kLanes<T>;
      for (ptrdiff_t t = steps.end - 1; t >= steps.begin; --t, panel += p.batch * across) {
        transpose_out<T>(
            std::min(across, H - column), p.batch,
            [&](ptrdiff_t u, ptrdiff_t b) { return share.state_in_product(t, column + u, b); },
            [&](ptrdiff_t b, ptrdiff_t u, int, Vector<T> h) { store(panel + b * across + u, h); });
      }
    });
  }

  const Share<T>& share;
  const Problem<T>& p;
  const ptrdiff_t H, W, width;
  Rows<T> states;
  std::vector<Piece> pieces;
  std::vector<Segment<T>> segments;
};

}  // namespace bnrnn
