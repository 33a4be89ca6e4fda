// The gradient of W_h: the sum over t of (gradient of W_h h_{t-1}) h_{t-1}^T, where h_{t-1} is that
// of the product, after dropout.
#pragma once

#include <vector>

#include "share.h"

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
    constexpr ptrdiff_t kRows = 60;  // whole tiles whose operands stay in the cache
    for (int gate = 0; gate < kGates; ++gate) {
      const Range features = {gate * H + share.units.begin, gate * H + share.units.end};
      for (ptrdiff_t r = features.begin; r < features.end; r += kRows) {
        add_rows({r, std::min(r + kRows, features.end)}, steps);
      }
    }
  }

 private:
  void add_rows(Range rows, Range steps) const {
    const ptrdiff_t depth = steps.size() * p.batch, row = gradient_row<T>(p.batch);
    const T* const grads = share.grad_recurrent_at(steps.end - 1, 0);
    for_column_chunks<T>(width, [&](ptrdiff_t column, int vectors) {
      const ptrdiff_t across = vectors * kLanes<T>;
      for (ptrdiff_t k0 = 0; k0 < depth; k0 += kDepth) {
        const ptrdiff_t deep = std::min(kDepth, depth - k0);
        for (ptrdiff_t r = rows.begin; r < rows.end; r += kTileRows) {
          const int count = static_cast<int>(std::min<ptrdiff_t>(kTileRows, rows.end - r));
          T* c[kTileRows];
          for (int i = 0; i < count; ++i) c[i] = p.grad_weight_hh + (r + i) * width;
          tile_of<T>(count, vectors)(
              grads + r * row + k0, row, 1, states.data() + column * depth + k0 * across, across,
              deep, c, column, steps.end < p.steps || k0 > 0);
        }
      }
    });
  }

  // Store h_{t-1} as the right operand: [chunk of columns][t, last step first][b][unit]; zero
  // beyond H.
  void transpose_states(Range steps) {
    constexpr int lanes = kLanes<T>;
    T* panel = states.data();
    for_column_chunks<T>(width, [&](ptrdiff_t column, int vectors) {
      const ptrdiff_t across = vectors * lanes;
      for (ptrdiff_t t = steps.end - 1; t >= steps.begin; --t, panel += p.batch * across) {
        for (ptrdiff_t u0 = 0; u0 < across; u0 += lanes) {
          const ptrdiff_t unit = column + u0;
          for (ptrdiff_t b0 = 0; b0 < p.batch; b0 += lanes) {
            Vector<T> block[lanes];
            for (int i = 0; i < lanes; ++i) {
              block[i] = unit + i < H ? share.state_in_product(t, unit + i, b0) : zero<T>();
            }
            transpose<T>(block);
            for (int i = 0; i < lanes && b0 + i < p.batch; ++i) {
              store(panel + (b0 + i) * across + u0, block[i]);
            }
          }
        }
      }
    });
  }

  const Share<T>& share;
  const Problem<T>& p;
  const ptrdiff_t H, W, width;
  std::vector<T> states;
};

}  // namespace bnrnn
