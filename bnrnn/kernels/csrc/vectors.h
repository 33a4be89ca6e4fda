// Vectors of the machine's width, as the compilers' own vector types. Only masked loads and stores
// use intrinsics, so one source serves AVX-512, AVX2 and all other machines.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace bnrnn {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define BNRNN_INLINE inline __attribute__((always_inline))

template <typename T>
struct Types;

template <>
struct Types<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  static constexpr float max_exponent = 87.0f;
  // Adding it rounds to an integer, which is then in the low bits.
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;
  static constexpr int taylor_degree = 8;
};

template <>
struct Types<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double max_exponent = 708.0;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723e-6;
  static constexpr int taylor_degree = 14;
};

template <typename T>
using Vector = typename Types<T>::Vector;
template <typename T>
using Integers = typename Types<T>::Integers;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
BNRNN_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename Types<T>::Unaligned*>(p);
}

template <typename T>
BNRNN_INLINE void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename Types<T>::Unaligned*>(p) = v;
}

// Load the first `count` lanes. The others are zero; their memory is not read.
template <typename T>
BNRNN_INLINE Vector<T> load_first(const T* p, int count) {
  if (count >= kLanes<T>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  } else {
    return (Vector<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
  }
#else
  T lanes[kLanes<T>] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

// Store the first `count` lanes; memory beyond them is not written.
template <typename T>
BNRNN_INLINE void store_first(T* p, Vector<T> v, int count) {
  if (count >= kLanes<T>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
  }
#else
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
#endif
}

template <typename T>
BNRNN_INLINE Vector<T> zero() {
  return Vector<T>{};
}

template <typename T>
BNRNN_INLINE Vector<T> broadcast(T x) {
  return x - zero<T>();  // exact, even of -0
}

// Load the first `count` bytes as integers of a lane's width. The others are zero; their memory is
// not read.
template <typename T>
BNRNN_INLINE Integers<T> widened(const uint8_t* p, int count) {
  typename Types<T>::Bytes bytes = {};
  if (count >= kLanes<T>) {
    std::memcpy(&bytes, p, kLanes<T>);
  } else {
    for (int i = 0; i < count; ++i) bytes[i] = p[i];
  }
  return __builtin_convertvector(bytes, Integers<T>);
}

// The sum of the lanes, adding halves to halves in a fixed order.
template <typename T>
BNRNN_INLINE T sum(Vector<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
#pragma GCC unroll 8
  for (int half = kLanes<T> / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// exp(x) - 1, accurate to the last bit or two even near zero; x is clamped to avoid overflow.
template <typename T>
BNRNN_INLINE Vector<T> exp_minus_1(Vector<T> x) {
  using Of = Types<T>;
  const Vector<T> most = broadcast<T>(Of::max_exponent);
  x = x > most ? most : x;
  x = x < -most ? -most : x;
  const Vector<T> rounded = x * static_cast<T>(1.4426950408889634) + Of::rounder;
  const Vector<T> n = rounded - Of::rounder;
  const Vector<T> r = x - n * Of::ln2_high - n * Of::ln2_low;  // |r| <= ln(2) / 2
  // The Taylor series of exp(r) - 1, starting from its last term.
  Vector<T> series = zero<T>();
  T factorial = 1;
  for (int k = 2; k <= Of::taylor_degree; ++k) factorial *= static_cast<T>(k);
#pragma GCC unroll 16
  for (int k = Of::taylor_degree; k >= 2; --k) {
    series = series * r + 1 / factorial;
    factorial /= static_cast<T>(k);
  }
  series = series * r * r + r;
  const Integers<T> shifted = ((Integers<T>)rounded + Of::exponent_bias) << Of::mantissa_bits;
  const Vector<T> power = (Vector<T>)shifted;  // 2^n
  return power * series + (power - 1);
}

template <typename T>
BNRNN_INLINE Vector<T> sigmoid(Vector<T> x) {
  const Vector<T> e = exp_minus_1<T>(x);
  return (e + 1) / (e + 2);
}

template <typename T>
BNRNN_INLINE Vector<T> tanh(Vector<T> x) {
  // tanh is 1 beyond 20 in both types; the square of exp must not overflow.
  const Vector<T> most = broadcast<T>(20);
  x = x > most ? most : x;
  x = x < -most ? -most : x;
  const Vector<T> e = exp_minus_1<T>(x + x);
  return e / (e + 2);
}

template <typename T, int kStride>
BNRNN_INLINE void interleave(Vector<T>& a, Vector<T>& b) {
  // Swap blocks of kStride lanes, as a transpose of 2 x 2 blocks does.
  constexpr int n = kLanes<T>;
  Integers<T> low, high;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    const bool second = (i / kStride) % 2 == 1;
    low[i] = second ? n + i - kStride : i;
    high[i] = second ? n + i : i + kStride;
  }
#if defined(__clang__)
  Vector<T> p, q;
  for (int i = 0; i < n; ++i) {
    p[i] = low[i] < n ? a[low[i]] : b[low[i] - n];
    q[i] = high[i] < n ? a[high[i]] : b[high[i] - n];
  }
  a = p, b = q;
#else
  const Vector<T> p = __builtin_shuffle(a, b, low), q = __builtin_shuffle(a, b, high);
  a = p, b = q;
#endif
}

template <typename T, int kStride>
BNRNN_INLINE void transpose_stage(Vector<T> (&rows)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((i / kStride) % 2 == 0) interleave<T, kStride>(rows[i], rows[i + kStride]);
  }
  if constexpr (kStride > 1) transpose_stage<T, kStride / 2>(rows);
}

template <typename T>
BNRNN_INLINE void transpose(Vector<T> (&rows)[kLanes<T>]) {
  transpose_stage<T, kLanes<T> / 2>(rows);
}

}  // namespace bnrnn
