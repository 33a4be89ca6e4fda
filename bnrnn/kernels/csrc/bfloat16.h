// Matrix products of factors rounded to bfloat16, with sums in float.
//
// Processors multiply pairs of such factors, which are neighbours along k, the dimension that is
// summed over. So the left operand is laid out as
//     [tile of kBf16Rows rows][block of kBf16Depth along k][row][k]
// and the right one as
//     [vector of columns][pair along k][column][2].
// Both are padded with zeros to whole blocks along k.
#pragma once

#include "vectors.h"

namespace bnrnn {

typedef uint16_t Bf16 __attribute__((may_alias));  // a bfloat16: the upper half of a float

constexpr ptrdiff_t kBf16Rows = 16, kBf16Depth = 32;
constexpr ptrdiff_t kBf16Block = kBf16Rows * kBf16Depth;  // elements of a block of the left operand

inline ptrdiff_t bf16_blocks(ptrdiff_t depth) { return (depth + kBf16Depth - 1) / kBf16Depth; }

// Element (row, 0) of a left operand of this many blocks along k.
inline Bf16* bf16_row(Bf16* left, ptrdiff_t blocks, ptrdiff_t row) {
  return left + row / kBf16Rows * blocks * kBf16Block + row % kBf16Rows * kBf16Depth;
}

// The pairs of row k of a right operand that begin at this column, a whole vector.
inline Bf16* bf16_right_at(Bf16* right, ptrdiff_t blocks, ptrdiff_t k, ptrdiff_t column) {
  return right + 2 * (column * blocks * kBf16Depth / 2 + k / 2 * kLanes<float>);
}

// Element k of a row of a left operand; the row's element 0 is at `row`.
inline Bf16* bf16_along(Bf16* row, ptrdiff_t k) {
  return row + k / kBf16Depth * kBf16Block + k % kBf16Depth;
}

// Round to nearest, ties to even. The result is in the upper halves; the lower ones are not zero.
BNRNN_INLINE Integers<float> bf16_bits(Vector<float> x) {
  const auto bits = (Integers<float>)x;
  const Integers<float> not_a_number = Integers<float>{} + 0x7fc00000;
  return x == x ? bits + (((bits >> 16) & 1) + 0x7fff) : not_a_number;
}

// The numbers that the functions below store. In all of these T is float: double is never rounded.
template <typename T>
BNRNN_INLINE Vector<T> rounded_to_bf16(Vector<T> x) {
  if constexpr (std::is_same_v<T, float>) return (Vector<T>)(bf16_bits(x) & ~0xffff);
  return x;
}

// Store one vector of row k of a right operand; `pairs` is its bf16_right_at.
template <typename T>
BNRNN_INLINE void put_bf16_right(Bf16* pairs, ptrdiff_t k, Vector<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    const Integers<float> bits = bf16_bits(x);
#if defined(__AVX512F__)
    if (k % 2 == 0) {
      _mm512_mask_storeu_epi16(pairs, 0x55555555, (__m512i)(bits >> 16));
    } else {
      _mm512_mask_storeu_epi16(pairs, 0xaaaaaaaa, (__m512i)bits);
    }
#else
    for (int i = 0; i < kLanes<float>; ++i) pairs[2 * i + k % 2] = static_cast<Bf16>(bits[i] >> 16);
#endif
  }
}

// Store a vector of neighbours along k, of which the first is at `to`, to a left operand.
template <typename T>
BNRNN_INLINE void put_bf16_left(Bf16* to, Vector<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    typedef uint16_t Bf16Vector __attribute__((vector_size(2 * kLanes<float>)));
    const Bf16Vector rounded = __builtin_convertvector(bf16_bits(x) >> 16, Bf16Vector);
    std::memcpy(to, &rounded, sizeof rounded);
  }
}

// Store x as element k of two neighbouring columns that sum to it, with 16 significant bits;
// `pairs` is bf16_right_at of the first.
inline void put_bf16_split(Bf16* pairs, ptrdiff_t k, float x) {
  const Vector<float> whole = broadcast(x), rest = whole - rounded_to_bf16<float>(whole);
  pairs[k % 2] = static_cast<Bf16>(bf16_bits(whole)[0] >> 16);
  pairs[2 + k % 2] = static_cast<Bf16>(bf16_bits(rest)[0] >> 16);
}

// Write rows (depth,) as tile(s) of a left operand; at(row, k) is the element. The last tile is
// padded with zero rows.
template <typename At>
void pack_bf16(Bf16* left, ptrdiff_t rows, ptrdiff_t depth, At&& at) {
  const ptrdiff_t blocks = bf16_blocks(depth);
  for (ptrdiff_t r0 = 0; r0 < rows; r0 += kBf16Rows) {
    for (ptrdiff_t k0 = 0; k0 < depth; k0 += kBf16Depth) {
      for (ptrdiff_t r = r0; r < r0 + kBf16Rows; ++r) {
        float row[kBf16Depth] = {};
        for (ptrdiff_t k = k0; r < rows && k < depth && k < k0 + kBf16Depth; ++k) {
          row[k - k0] = static_cast<float>(at(r, k));
        }
        for (ptrdiff_t i = 0; i < kBf16Depth; i += kLanes<float>) {
          put_bf16_left<float>(bf16_along(bf16_row(left, blocks, r), k0 + i), load(row + i));
        }
      }
    }
  }
}

// Up to kBf16Rows rows of a product: row r of the result is at c + r * stride.
struct Bf16Tile {
  const Bf16* left;
  float* c;
  ptrdiff_t stride;
  ptrdiff_t rows;
};

// c (+)= left times right for each tile, summed over the first `blocks` blocks along k. The right
// operand has `right_blocks` blocks and this many vectors of columns.
void bf16_product(const Bf16Tile* tiles, ptrdiff_t count, ptrdiff_t blocks, const Bf16* right,
                  ptrdiff_t right_blocks, ptrdiff_t vectors, bool add);

// How `bf16_product` multiplies here: "amx", "avx512_bf16", or "portable", which is slower than
// products in float. BNRNN_KERNEL_BFLOAT16 may name another one that the processor has.
const char* bf16_way();

// Sets up the thread that calls `bf16_product`, as long as it exists.
class Bf16Products {
 public:
  explicit Bf16Products(bool wanted);
  ~Bf16Products();
  Bf16Products(const Bf16Products&) = delete;

 private:
  const bool configured;
};

}  // namespace bnrnn
