// The gradient of one term, W_h h_{t-1} or W_x x_t, in bfloat16: the left operand of the gradient
// of its weight.
#pragma once

#include "share.h"

namespace bnrnn {

// Holds the thread's features for the steps of a block (steps_per_block). The products sum over
// these steps and the batch, whose padding stays zero.
template <typename T>
class Bf16Gradient {
 public:
  // Nothing is stored unless `wanted`.
  Bf16Gradient(const Share<T>& share, bool wanted)
      : wanted(wanted),
        first(share.units.begin),
        steps(steps_per_block(share.p.batch)),
        blocks_per_step(bf16_blocks(share.p.batch)),
        left(wanted ? ceil_div(share.units.size(), kGroup) * kGates * blocks() * kBf16Block : 0) {}

  // Blocks along k of this many steps.
  ptrdiff_t blocks(ptrdiff_t of_steps) const { return of_steps * blocks_per_step; }
  ptrdiff_t blocks() const { return blocks(steps); }

  // Where sequence b of step t is along k.
  ptrdiff_t at(ptrdiff_t t, ptrdiff_t b) const {
    return t % steps * blocks_per_step * kBf16Depth + b;
  }

  // The row of a feature at step t, in which sequence b is element b (bf16_along); null if not
  // wanted.
  Bf16* row(ptrdiff_t t, int gate, ptrdiff_t j) {
    if (!wanted) return nullptr;
    const ptrdiff_t unit = j - first,
                    row = (unit / kGroup * kGates + gate) * kGroup + unit % kGroup;
    return bf16_along(bf16_row(left.data(), blocks(), row), at(t, 0));
  }

  // The tile of a group's features of one gate.
  const Bf16* tile(Range group, int gate) const {
    return left.data() + ((group.begin - first) / kGroup * kGates + gate) * blocks() * kBf16Block;
  }

  const bool wanted;

 private:
  static_assert(kGroup == kBf16Rows);
  const ptrdiff_t first;  // unit
  const ptrdiff_t steps, blocks_per_step;
  Rows<uint16_t> left;
};

}  // namespace bnrnn
