// The elementary functions of the recurrence: sigmoid and tanh of vectors.
#pragma once

#include "vectors.h"

namespace bnrnn {

// What exp(x) = 2^n exp(r) needs, with x = n ln(2) + r and |r| <= ln(2) / 2, and
// exp(r) = 1 + r + r² (series[0] + series[1] r + ...).
template <typename T>
struct Exponential;

template <>
struct Exponential<float> {
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  // Beyond it, sigmoid(x) is 0 or 1, and tanh(x / 2) -1 or 1, but for 5e-18. The square of its exp
  // must be a number.
  static constexpr float largest = 40.0f;
  // Adding it rounds to an integer, which is then in the low bits.
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;
  // The polynomial of this degree whose largest relative error in exp(r) - 1 is least: 1.4e-8.
  static constexpr int terms = 5;
  static constexpr float series[terms] = {0.5f, 0.16666543f, 0.04166628f, 0.008366609f,
                                          0.0013946488f};
};

template <>
struct Exponential<double> {
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double largest = 350.0;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723e-6;
  // Taylor's.
  static constexpr int terms = 13;
  static constexpr double series[terms] = {
      1.0 / 2,         1.0 / 6,          1.0 / 24,         1.0 / 120,     1.0 / 720,
      1.0 / 5040,      1.0 / 40320,      1.0 / 362880,     1.0 / 3628800, 1.0 / 39916800,
      1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200};
};

// For N vectors x within [-largest, largest]: r, 2^n and the sum of the series. Each is a long
// chain of dependent instructions, so each step is done for all N before the next: a processor
// looks only a few dozen instructions ahead.
template <typename T, int N>
BNRNN_INLINE void split_exponential(const Vector<T> (&x)[N], Vector<T> (&r)[N],
                                    Vector<T> (&power)[N], Vector<T> (&series)[N]) {
  using Of = Exponential<T>;
  Vector<T> rounded[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) rounded[i] = x[i] * T(1.4426950408889634) + Of::rounder;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const Vector<T> n = rounded[i] - Of::rounder;
    r[i] = x[i] - n * Of::ln2_high - n * Of::ln2_low;
    const Integers<T> exponent = (Integers<T>)rounded[i] + Of::exponent_bias;
    power[i] = (Vector<T>)(exponent << Of::mantissa_bits);
    series[i] = broadcast(Of::series[Of::terms - 1]);
  }
#pragma GCC unroll 16
  for (int k = Of::terms - 2; k >= 0; --k) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) series[i] = series[i] * r[i] + Of::series[k];
  }
}

// A quotient that is not divided yet.
template <typename T>
struct Fraction {
  Vector<T> above, below;
};

// sigmoid(x) = exp(x) / (exp(x) + 1).
template <typename T>
BNRNN_INLINE Fraction<T> sigmoid_of(Vector<T> r, Vector<T> power, Vector<T> series) {
  const Vector<T> exponential = ((series * r + 1) * r + 1) * power;
  return {exponential, exponential + 1};
}

// tanh(x / 2) = (exp(x) - 1) / (exp(x) + 1). The difference is accurate near zero, too.
template <typename T>
BNRNN_INLINE Fraction<T> tanh_of(Vector<T> r, Vector<T> power, Vector<T> series) {
  const Vector<T> less_1 = power * (series * r * r + r) + (power - 1);
  return {less_1, less_1 + 2};
}

// Replace N vectors by their tanh.
template <typename T, int N>
BNRNN_INLINE void tanh(Vector<T> (&x)[N]) {
  Vector<T> r[N], power[N], series[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = clamp<T>(x[i] + x[i], Exponential<T>::largest);
  split_exponential<T, N>(x, r, power, series);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const Fraction<T> of = tanh_of<T>(r[i], power[i], series[i]);
    x[i] = of.above / of.below;
  }
}

// Replace the vectors by their sigmoid, but number kTanh by its tanh. Divisions take longer than
// all else here, so two quotients share one: a / b = a d / (b d), c / d = c b / (b d).
template <typename T, int kTanh>
BNRNN_INLINE void sigmoid_and_tanh(Vector<T> (&x)[4]) {
  Vector<T> r[4], power[4], series[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = clamp<T>(i == kTanh ? x[i] + x[i] : x[i], Exponential<T>::largest);
  }
  split_exponential<T, 4>(x, r, power, series);
  Fraction<T> of[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    of[i] = i == kTanh ? tanh_of<T>(r[i], power[i], series[i])
                       : sigmoid_of<T>(r[i], power[i], series[i]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    const Vector<T> inverse = 1 / (of[i].below * of[i + 1].below);
    x[i] = of[i].above * of[i + 1].below * inverse;
    x[i + 1] = of[i + 1].above * of[i].below * inverse;
  }
}

}  // namespace bnrnn
