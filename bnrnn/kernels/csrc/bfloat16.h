// Matrix products of factors rounded to bfloat16, with sums in float.
//
// Processors multiply pairs of such factors, which are neighbours along k, the dimension that is
// summed over. So the left operand is laid out as
//     [tile of kHalfRows rows][block of kHalfDepth along k][row][k]
// and the right one as
//     [vector of columns][pair along k][column][2].
// Both are padded with zeros to whole blocks along k.
#pragma once

#include "vectors.h"

namespace bnrnn {

typedef uint16_t Half __attribute__((may_alias));  // a bfloat16: the upper half of a float

constexpr ptrdiff_t kHalfRows = 16, kHalfDepth = 32;
constexpr ptrdiff_t kHalfBlock = kHalfRows * kHalfDepth;  // elements of a block of the left operand

inline ptrdiff_t half_blocks(ptrdiff_t depth) { return (depth + kHalfDepth - 1) / kHalfDepth; }

// Element (row, 0) of a left operand of this many blocks along k.
inline Half* half_row(Half* left, ptrdiff_t blocks, ptrdiff_t row) {
  return left + row / kHalfRows * blocks * kHalfBlock + row % kHalfRows * kHalfDepth;
}

// The pairs of row k of a right operand that begin at this column, a whole vector.
inline Half* half_right_at(Half* right, ptrdiff_t blocks, ptrdiff_t k, ptrdiff_t column) {
  return right + 2 * (column * blocks * kHalfDepth / 2 + k / 2 * kLanes<float>);
}

// Element k of a row of a left operand; the row's element 0 is at `row`.
inline Half* half_along(Half* row, ptrdiff_t k) {
  return row + k / kHalfDepth * kHalfBlock + k % kHalfDepth;
}

// Round to nearest, ties to even. The result is in the upper halves; the lower ones are not zero.
BNRNN_INLINE Integers<float> half_bits(Vector<float> x) {
  const auto bits = (Integers<float>)x;
  const Integers<float> not_a_number = Integers<float>{} + 0x7fc00000;
  return x == x ? bits + (((bits >> 16) & 1) + 0x7fff) : not_a_number;
}

// The numbers that the functions below store. In all of these T is float: double is never rounded.
template <typename T>
BNRNN_INLINE Vector<T> rounded_to_half(Vector<T> x) {
  if constexpr (std::is_same_v<T, float>) return (Vector<T>)(half_bits(x) & ~0xffff);
  return x;
}

// Store one vector of row k of a right operand; `pairs` is its half_right_at.
template <typename T>
BNRNN_INLINE void put_half_right(Half* pairs, ptrdiff_t k, Vector<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    const Integers<float> bits = half_bits(x);
#if defined(__AVX512F__)
    if (k % 2 == 0) {
      _mm512_mask_storeu_epi16(pairs, 0x55555555, (__m512i)(bits >> 16));
    } else {
      _mm512_mask_storeu_epi16(pairs, 0xaaaaaaaa, (__m512i)bits);
    }
#else
    for (int i = 0; i < kLanes<float>; ++i) pairs[2 * i + k % 2] = static_cast<Half>(bits[i] >> 16);
#endif
  }
}

// Store a vector of neighbours along k, of which the first is at `to`, to a left operand.
template <typename T>
BNRNN_INLINE void put_half_left(Half* to, Vector<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes<float>)));
    const Halves halves = __builtin_convertvector(half_bits(x) >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
  }
}

// Store x as element k of two neighbouring columns that sum to it, with 16 significant bits; `pairs`
// is half_right_at of the first.
inline void put_half_split(Half* pairs, ptrdiff_t k, float x) {
  const Vector<float> whole = broadcast(x), rest = whole - rounded_to_half<float>(whole);
  pairs[k % 2] = static_cast<Half>(half_bits(whole)[0] >> 16);
  pairs[2 + k % 2] = static_cast<Half>(half_bits(rest)[0] >> 16);
}

// Write rows (depth,) as tile(s) of a left operand; at(row, k) is the element. The last tile is
// padded with zero rows.
template <typename At>
void pack_half(Half* left, ptrdiff_t rows, ptrdiff_t depth, At&& at) {
  const ptrdiff_t blocks = half_blocks(depth);
  for (ptrdiff_t r0 = 0; r0 < rows; r0 += kHalfRows) {
    for (ptrdiff_t k0 = 0; k0 < depth; k0 += kHalfDepth) {
      for (ptrdiff_t r = r0; r < r0 + kHalfRows; ++r) {
        float row[kHalfDepth] = {};
        for (ptrdiff_t k = k0; r < rows && k < depth && k < k0 + kHalfDepth; ++k) {
          row[k - k0] = static_cast<float>(at(r, k));
        }
        for (ptrdiff_t i = 0; i < kHalfDepth; i += kLanes<float>) {
          put_half_left<float>(half_along(half_row(left, blocks, r), k0 + i), load(row + i));
        }
      }
    }
  }
}

// Up to kHalfRows rows of a product: row r of the result is at c + r * stride.
struct HalfTile {
  const Half* left;
  float* c;
  ptrdiff_t stride;
  ptrdiff_t rows;
};

// c (+)= left times right for each tile, summed over the first `blocks` blocks along k. The right
// operand has `right_blocks` blocks and this many vectors of columns.
void half_product(const HalfTile* tiles, ptrdiff_t count, ptrdiff_t blocks, const Half* right,
                  ptrdiff_t right_blocks, ptrdiff_t vectors, bool add);

// How `half_product` multiplies here: "amx", "avx512_bf16", or "portable", which is slower than
// products in float. BNRNN_KERNEL_BFLOAT16 may name another one that the processor has.
const char* half_way();

// Sets up the thread that calls `half_product`, as long as it exists.
class HalfProducts {
 public:
  explicit HalfProducts(bool wanted);
  ~HalfProducts();
  HalfProducts(const HalfProducts&) = delete;

 private:
  const bool configured;
};

}  // namespace bnrnn
