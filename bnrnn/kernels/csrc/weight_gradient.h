// The gradient of W_h, once the gradients of all W_h h_{t-1} are there.
#pragma once

#include <vector>

#include "share.h"

namespace bnrnn {

// The sum over t of (gradient of W_h h_{t-1}) h_{t-1}^T, blocked for the cache: a block of the
// result (all gates of some units, some columns) and the panel of states stay in the second level.
template <typename T>
class WeightGradient {
 public:
  explicit WeightGradient(const Share<T>& share)
      : share(share), p(share.p), H(share.H), W(share.W), units(share.units) {}

  void compute() const {
    constexpr ptrdiff_t kUnits = 126, kColumns = 4 * kTileVectors * kLanes<T>;
    const ptrdiff_t steps_a_block = std::max<ptrdiff_t>(1, kDepth / p.batch);
    std::vector<T> panel(steps_a_block * p.batch * kColumns);
    for (ptrdiff_t j0 = units.begin; j0 < units.end; j0 += kUnits) {
      const Range some = {j0, std::min(j0 + kUnits, units.end)};
      for (ptrdiff_t k0 = 0; k0 < p.grad_weight_columns; k0 += kColumns) {
        const Range columns = {k0, std::min(k0 + kColumns, p.grad_weight_columns)};
        for (ptrdiff_t t0 = 0; t0 < p.steps; t0 += steps_a_block) {
          const Range steps = {t0, std::min(t0 + steps_a_block, p.steps)};
          transposed_states(panel.data(), steps, columns);
          for (int gate = 0; gate < kGates; ++gate) {
            grad_weight_block({gate * H + some.begin, gate * H + some.end}, columns, steps,
                              panel.data());
          }
        }
      }
    }
  }

 private:
  void grad_weight_block(Range rows, Range columns, Range steps, const T* panel) const {
    for_column_chunks<T>(columns.size(), [&](ptrdiff_t column, int vectors) {
      const ptrdiff_t across = vectors * kLanes<T>;
      for (ptrdiff_t r = rows.begin; r < rows.end; r += kTileRows) {
        const int count = static_cast<int>(std::min<ptrdiff_t>(kTileRows, rows.end - r));
        T* c[kTileRows];
        for (int i = 0; i < count; ++i) {
          c[i] = p.grad_weight_hh + (r + i) * p.grad_weight_columns + columns.begin;
        }
        for (ptrdiff_t t = steps.begin; t < steps.end; ++t) {
          tile_of<T>(count, vectors)(
              p.grad_recurrent + (t * kGates * H + r) * W, W, 1,
              panel + (t - steps.begin) * p.batch * across, across, p.batch, c, column, t > 0);
        }
      }
      panel += steps.size() * p.batch * across;
    });
  }

  // h_{t-1} of some steps and units as [chunk of columns][t][b][unit]; zero beyond H.
  void transposed_states(T* panel, Range steps, Range columns) const {
    constexpr int lanes = kLanes<T>;
    for_column_chunks<T>(columns.size(), [&](ptrdiff_t column, int vectors) {
      const ptrdiff_t across = vectors * lanes;
      for (ptrdiff_t t = steps.begin; t < steps.end; ++t, panel += p.batch * across) {
        for (ptrdiff_t u0 = 0; u0 < across; u0 += lanes) {
          const ptrdiff_t unit = columns.begin + column + u0;
          for (ptrdiff_t b0 = 0; b0 < p.batch; b0 += lanes) {
            Vector<T> block[lanes];
            for (int i = 0; i < lanes; ++i) {
              block[i] = unit + i < H ? load(share.state_at(t) + (unit + i) * W + b0) : zero<T>();
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
  const ptrdiff_t H, W;
  const Range units;
};

}  // namespace bnrnn
