// Vectors of the machine's width, as the compilers' own vector types. Only masked loads and stores
// use intrinsics, so one source serves AVX-512, AVX2 and all other machines.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
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
};

template <>
struct Types<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
};

template <typename T>
using Vector = typename Types<T>::Vector;
template <typename T>
using Integers = typename Types<T>::Integers;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// An array that begins at a cache line, so that its vectors do not cross lines.
template <typename T>
struct AtLines {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const AtLines&) const { return true; }
};
template <typename T>
using Rows = std::vector<T, AtLines<T>>;

template <typename T>
BNRNN_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename Types<T>::Unaligned*>(p);
}

template <typename T>
BNRNN_INLINE void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename Types<T>::Unaligned*>(p) = v;
}

// Store to whole cache lines that are not needed soon, without reading them first and past the
// caches. Other threads see them after `finish_streams`.
template <typename T>
BNRNN_INLINE void stream(T* p, Vector<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store(p, v);
#endif
}

inline void finish_streams() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

// Copy fewer elements than a vector has, in pieces of 4, 2 and 1.
template <typename T>
BNRNN_INLINE void copy_first(T* to, const T* from, int count) {
  if (kLanes<T> > 4 && (count & 4)) std::memcpy(to, from, 4 * sizeof(T)), to += 4, from += 4;
  if (count & 2) std::memcpy(to, from, 2 * sizeof(T)), to += 2, from += 2;
  if (count & 1) *to = *from;
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
  copy_first(lanes, p, count);
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
  copy_first(p, lanes, count);
#endif
}

// Fetch the memory of `count` elements into the cache, to be read or (kWrite) written later. Rows
// that are far apart are not recognised by the processor's own prefetchers.
template <bool kWrite, typename T>
BNRNN_INLINE void prefetch(const T* p, ptrdiff_t count) {
  constexpr ptrdiff_t line = 64 / sizeof(T);
  for (ptrdiff_t i = 0; i < count; i += line) __builtin_prefetch(p + i, kWrite);
  __builtin_prefetch(p + count - 1, kWrite);
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

// Lane i is lane source(i) of `a`, or lane source(i) - n of `b`, for vectors of n lanes.
template <typename T, typename Source>
BNRNN_INLINE Vector<T> permuted(Vector<T> a, Vector<T> b, Source&& source) {
  constexpr int n = kLanes<T>;
#if defined(__clang__)
  Vector<T> to;
  for (int i = 0; i < n; ++i) to[i] = source(i) < n ? a[source(i)] : b[source(i) - n];
  return to;
#else
  Integers<T> from;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) from[i] = source(i);
  return __builtin_shuffle(a, b, from);
#endif
}

template <typename T, int kStride>
BNRNN_INLINE void interleave(Vector<T>& a, Vector<T>& b) {
  // Swap blocks of kStride lanes, as a transpose of 2 x 2 blocks does.
  constexpr int n = kLanes<T>;
  const Vector<T> low =
      permuted<T>(a, b, [](int i) { return i / kStride % 2 == 1 ? n + i - kStride : i; });
  b = permuted<T>(a, b, [](int i) { return i / kStride % 2 == 1 ? n + i : i + kStride; });
  a = low;
}

// The sums of each two neighbouring lanes, in the first half of the lanes; the others are zero.
template <typename T>
BNRNN_INLINE Vector<T> pair_sums(Vector<T> v) {
  constexpr int n = kLanes<T>;
  return permuted<T>(v, zero<T>(), [](int i) { return i < n / 2 ? 2 * i : n; }) +
         permuted<T>(v, zero<T>(), [](int i) { return i < n / 2 ? 2 * i + 1 : n; });
}

// kCount elements, repeated to fill the vector.
template <typename T, int kCount>
BNRNN_INLINE Vector<T> repeated(const T* p) {
  constexpr int bytes = kCount * static_cast<int>(sizeof(T));
  if constexpr (kCount == 1) return broadcast(*p);
  if constexpr (bytes == kVectorBytes) return load(p);
#if defined(__AVX512F__)
  if constexpr (bytes == 32) {
    return (Vector<T>)_mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(p)));
  }
  if constexpr (bytes == 16) {
    return (Vector<T>)_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p)));
  }
#elif defined(__AVX2__)
  if constexpr (bytes == 16) {
    return (Vector<T>)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  }
#endif
  if constexpr (kCount > 1 && bytes == 8) {
    int64_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Vector<T>)(Integers<double>{} + bits);
  }
}

// Part of the sums of M vectors: add lanes whose distance is kStride. Each pair of vectors becomes
// one, with the sums of the second vector between those of the first.
template <typename T, int kStride, int M, int N>
BNRNN_INLINE void add_lanes(Vector<T> (&v)[N]) {
  if constexpr (kStride > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < M / 2; ++i) {
      Vector<T> a = v[2 * i], b = v[2 * i + 1];
      interleave<T, kStride>(a, b);
      v[i] = a + b;
    }
    add_lanes<T, kStride / 2, M / 2>(v);
  }
}

// The order in which `sum` needs its vectors: add_lanes leaves the sum of vector i in a lane whose
// number has the bits of i in reverse order.
template <int N, int kLanesOfVector>
constexpr std::array<int, N> order_for_sums() {
  std::array<int, N> order = {};
  for (int i = 0; i < N; ++i) {
    int reversed = 0;
    for (int bit = 1; bit < kLanesOfVector; bit *= 2) reversed = 2 * reversed + (i & bit ? 1 : 0);
    order[i] = i / kLanesOfVector * kLanesOfVector + reversed;
  }
  return order;
}

// to[n] = sum of the lanes of v[n], in the same order as above; N is a power of two and at least
// the number of lanes.
template <typename T, int N>
BNRNN_INLINE void sum(const Vector<T> (&v)[N], T* to) {
  constexpr int lanes = kLanes<T>;
  static_assert(N >= lanes);
  static constexpr std::array<int, N> order = order_for_sums<N, lanes>();
  Vector<T> left[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) left[i] = v[order[i]];
  add_lanes<T, lanes / 2, N>(left);
  for (int i = 0; i < N / lanes; ++i) store(to + i * lanes, left[i]);
}

// The smaller of each pair of lanes; b where one of them is not a number. The compilers' ternary
// operator takes two instructions.
template <typename T>
BNRNN_INLINE Vector<T> minimum(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_min_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm256_min_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

template <typename T>
BNRNN_INLINE Vector<T> maximum(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// Square roots.
template <typename T>
BNRNN_INLINE Vector<T> root(Vector<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_sqrt_ps((__m512)x);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm256_sqrt_ps((__m256)x);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kLanes<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// x within [-most, most]; a lane that is not a number stays so.
template <typename T>
BNRNN_INLINE Vector<T> clamp(Vector<T> x, T most) {
  return maximum<T>(broadcast<T>(-most), minimum<T>(broadcast<T>(most), x));
}

// visit(b, vectors) for blocks of vectors from column b on: blocks of 4, and single ones at the
// end. `vectors` is an integral constant.
template <typename T, typename Visit>
BNRNN_INLINE void for_blocks(ptrdiff_t width, Visit&& visit) {
  constexpr ptrdiff_t kTogether = 4;
  ptrdiff_t b = 0;
  for (; b + kTogether * kLanes<T> <= width; b += kTogether * kLanes<T>) {
    visit(b, std::integral_constant<int, kTogether>());
  }
  for (; b < width; b += kLanes<T>) visit(b, std::integral_constant<int, 1>());
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
