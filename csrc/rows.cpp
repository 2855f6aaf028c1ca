// The row kernels, on torch's vectors. This file is compiled once per instruction set (CPU_CAPABILITY, as torch's own
// kernels are): AVX2, AVX-512 and the compiler's default.
//
//   x = (z - max z) / temperature     log_norm = log sum exp x     mean = sum x exp x / sum exp x
//
// With a soft cap c, c tanh(z / c) replaces z throughout, and the gradient is multiplied by 1 - tanh(z / c)^2. The cap
// is a template argument, so rows without one pay nothing.
//
// Statistics take two looks at a row. The first finds the maximum and brings the row into the cache. The second
// subtracts that one maximum from the whole row, so that its exponentials can be kept for the gradient, and prefetches
// the next row. Sums are flushed to double every 16 steps, so their error does not grow with V. The maximum is
// subtracted before the division by the temperature, so that an offset common to all logits causes no rounding error.
// Lanes are added in order, which gives the same bits on every run and with any number of threads. Another instruction
// set has other lanes and may differ in the last bits.
//
// The gradient multiplies the exponentials that the second look left in a buffer of one row, or recomputes them if
// there is no buffer, and writes once, in place or elsewhere. Without entropy gradient and soft cap it does not read
// the row.
//
// Floor per row, for B bytes per logit: B V read by the first look and B V written by the gradient; the rest stays in
// the cache. Arithmetic, counted in the machine code of the loops: for 16 logits, AVX-512 takes 2 vector instructions
// in the first look, 17.5 in the second (an exponential takes 9: round, subtract, 6 multiply-adds, scale) and 2 in the
// gradient, or 6.5 if that is rounded to bfloat16.
#include "rows.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

namespace lead {
namespace CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;  // sums in float, in double for double

// Powers of `base`, to which a row's arguments are scaled once: powers of 2 in float, of e in double.
template <typename A>
struct Power;

// 2^x = 2^n 2^f with n = round(x): 2^f by a minimax polynomial of degree 6 that is exactly 1 at 0, n by the exponent's
// bits. Relative error below 1e-7 for zero <= x <= 0. NaN stays NaN, whatever its payload.
template <>
struct Power<float> {
  using V = Vectorized<float>;
  static constexpr double log_base = 0.693147180559945309417;
  // Below, 2^zero is exactly 0: 2^-151 rounds to it, and 2^-127 is not a normal number.
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr float zero = -151;
  static V of(const V& x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(fraction(x - V(n)), n);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  static constexpr float zero = -127;
  static V of(const V& x) {
    const __m256i n = _mm256_cvtps_epi32(x);  // NaN becomes the smallest integer, whose low bits are 0
    const __m256i p = _mm256_castps_si256(fraction(x - V(_mm256_cvtepi32_ps(n))));
    return _mm256_castsi256_ps(_mm256_add_epi32(p, _mm256_slli_epi32(n, 23)));
  }
#else
  static constexpr float zero = -127;
  static V of(const V& x) {
    const V magic(12582912.0f);  // n sits in the low bits of x + 1.5 * 2^23
    const V shifted = x + magic;
    const V f = x - (shifted - magic);
    const auto exponent = at::vec::cast<int32_t>(shifted) << Vectorized<int32_t>(23);
    return at::vec::cast<float>(at::vec::cast<int32_t>(fraction(f)) + exponent) + (f - f);
  }
#endif
  static V fraction(const V& f) {
    V p(0.000153533518f);
    p = fmadd(p, f, V(0.00133988878f));
    p = fmadd(p, f, V(0.00961843785f));
    p = fmadd(p, f, V(0.0555033237f));
    p = fmadd(p, f, V(0.240226477f));
    p = fmadd(p, f, V(0.693147182f));
    return fmadd(p, f, V(1.0f));
  }
};

template <>
struct Power<double> {
  static constexpr double log_base = 1;
  static constexpr double zero = -746;  // exp(zero) is 0
  static Vectorized<double> of(const Vectorized<double>& x) { return x.exp(); }
};

// tanh(u) and its derivative. In float tanh(u) = 1 - 2 q with q = e / (1 + e), e = exp(-2 |u|); below 0.55, where that
// would cancel, u times a minimax polynomial in u^2. The error is at most 2 units in the last place. The derivative 4 q
// (1 - q) keeps its digits where tanh rounds to 1. All sums are explicit multiply-adds, so that the compiler cannot
// fuse them differently in different places: a row's maximum must have the same bits wherever it is computed.
template <typename A>
struct Tanh {
  Vectorized<A> value, slope;
};

inline Tanh<float> tanh_of(const Vectorized<float>& u) {
  using V = Vectorized<float>;
  const V size = u.abs();
  const V e = Power<float>::of(at::vec::clamp_min(size * V(-2.88539008f), V(Power<float>::zero)));
  const V q = e / (V(1.0f) + e);
  const V square = u * u;
  V p(-0.00627423963f);
  p = fmadd(p, square, V(0.0210716780f));
  p = fmadd(p, square, V(-0.0538523085f));
  p = fmadd(p, square, V(0.133325860f));
  p = fmadd(p, square, V(-0.333333164f));
  const V large = fmadd(q, V(-2.0f), V(1.0f)) | (u & V(-0.0f));
  return {V::blendv(large, fmadd(p, u * square, u), size < V(0.55f)), V(4.0f) * q * (V(1.0f) - q)};
}

inline Tanh<double> tanh_of(const Vectorized<double>& u) {
  using V = Vectorized<double>;
  const V c = u.cosh();
  return {u.tanh(), V(1) / (c * c)};
}

// Two vectors of logits, in memory and in registers. `place` is the lane of the k-th logit, counted over both vectors.
template <typename T>
struct Pair {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  static void load(const T* z, V& one, V& other) {
    if constexpr (std::is_same_v<T, A>) {
      one = V::loadu(z);
      other = V::loadu(z + V::size());
    } else {
      std::tie(one, other) = at::vec::convert_to_float<T>(Vectorized<T>::loadu(z));
    }
  }
  static void store(T* z, const V& one, const V& other) {
    if constexpr (std::is_same_v<T, A>) {
      one.store(z);
      other.store(z + V::size());
    } else {
      at::vec::convert_from_float<T>(one, other).store(z);
    }
  }
  static int64_t place(int64_t k) { return k; }
};

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// A bfloat16 is the upper half of a float: 16 or 8 words hold the even logits in their lower halves and the odd ones in
// their upper halves. Stores round to nearest, ties to even; they never see a NaN.
template <>
struct Pair<at::BFloat16> {
  using T = at::BFloat16;
  using V = Vectorized<float>;
#if defined(CPU_CAPABILITY_AVX512)
  using Words = __m512i;
  static Words words(const T* z) { return _mm512_loadu_si512(z); }
  static void put(T* z, Words w) { _mm512_storeu_si512(z, w); }
  static Words of(int32_t x) { return _mm512_set1_epi32(x); }
  static Words left(Words w) { return _mm512_slli_epi32(w, 16); }
  static Words right(Words w) { return _mm512_srli_epi32(w, 16); }
  static Words plus(Words a, Words b) { return _mm512_add_epi32(a, b); }
  static Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
  static Words either(Words a, Words b) { return _mm512_or_si512(a, b); }
  static V floats(Words w) { return _mm512_castsi512_ps(w); }
  static Words bits(const V& x) { return _mm512_castps_si512(x); }
#else
  using Words = __m256i;
  static Words words(const T* z) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(z)); }
  static void put(T* z, Words w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(z), w); }
  static Words of(int32_t x) { return _mm256_set1_epi32(x); }
  static Words left(Words w) { return _mm256_slli_epi32(w, 16); }
  static Words right(Words w) { return _mm256_srli_epi32(w, 16); }
  static Words plus(Words a, Words b) { return _mm256_add_epi32(a, b); }
  static Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
  static Words either(Words a, Words b) { return _mm256_or_si256(a, b); }
  static V floats(Words w) { return _mm256_castsi256_ps(w); }
  static Words bits(const V& x) { return _mm256_castps_si256(x); }
#endif
  static constexpr int32_t UPPER = static_cast<int32_t>(0xffff0000);
  static void load(const T* z, V& even, V& odd) {
    const Words w = words(z);
    even = floats(left(w));
    odd = floats(both(w, of(UPPER)));
  }
  // The bits of the float plus the increment that rounds its upper half.
  static Words rounded(const V& x) {
    const Words w = bits(x);
    return plus(plus(w, of(0x7fff)), both(right(w), of(1)));
  }
  static void store(T* z, const V& even, const V& odd) {
    put(z, either(right(rounded(even)), both(rounded(odd), of(UPPER))));
  }
  static int64_t place(int64_t k) {
    const int64_t lanes = V::size(), first = k / (2 * lanes) * 2 * lanes;
    return first + (k - first) % 2 * lanes + (k - first) / 2;
  }
};
#endif

constexpr int UNROLL = 4;
constexpr int BLOCK = 16;  // steps after which sums are added to the row's, in double

template <typename T>
struct Row {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  static constexpr int LANES = V::size();
  static constexpr int64_t STEP = UNROLL * LANES;
  static_assert(STEP <= ROOM);
  static constexpr A INF = std::numeric_limits<A>::infinity();

  static void load(const T* z, V (&v)[UNROLL]) {
    for (int i = 0; i < UNROLL; i += 2) Pair<T>::load(z + i * LANES, v[i], v[i + 1]);
  }
  static void store(T* z, const V (&v)[UNROLL]) {
    for (int i = 0; i < UNROLL; i += 2) Pair<T>::store(z + i * LANES, v[i], v[i + 1]);
  }
  // The same for vectors that may hold NaN.
  static void store_with_nan(T* z, const V (&v)[UNROLL]) {
    A lanes[STEP];
    for (int i = 0; i < UNROLL; ++i) v[i].store(lanes + i * LANES);
    for (int64_t k = 0; k < STEP; ++k) z[k] = static_cast<T>(lanes[Pair<T>::place(k)]);
  }

  struct Cap {
    V cap, inverse;
    explicit Cap(double softcap) : cap(static_cast<A>(softcap)), inverse(static_cast<A>(1 / softcap)) {}
    // Replaces a vector of logits by y; returns dy/dz.
    V apply(V& z) const {
      const auto t = tanh_of(z * inverse);
      z = fmadd(cap, t.value, V(A(0)));  // rounded before anything is subtracted
      return t.slope;
    }
    template <bool CAPPED>
    void apply_to(V (&z)[UNROLL]) const {
      if constexpr (CAPPED)
        for (V& x : z) apply(x);
    }
    // y of one logit, bit for bit as in a vector.
    double of(double z) const {
      V y(static_cast<A>(z));
      apply(y);
      A lanes[LANES];
      y.store(lanes);
      return lanes[0];
    }
  };

  // The exponent of a logit relative to the maximum; NaN stays NaN.
  static V exponent(const V& z, const V& max, const V& scale) {
    return at::vec::clamp_min((z - max) * scale, V(Power<A>::zero));
  }
  // base^x; 0 where it is negligible, NaN for NaN.
  static double power(double x) { return x <= Power<A>::zero ? 0 : std::exp(x * Power<A>::log_base); }

  struct Sums {
    V block_s{A(0)}, block_t{A(0)};
    double s[LANES] = {}, t[LANES] = {};
    int steps = 0;

    // Adds the block's sums to the row's.
    void flush() {
      A part_s[LANES], part_t[LANES];
      block_s.store(part_s);
      block_t.store(part_t);
      for (int l = 0; l < LANES; ++l) s[l] += part_s[l];
      for (int l = 0; l < LANES; ++l) t[l] += part_t[l];
      block_s = block_t = V(A(0));
      steps = 0;
    }
    void add(const V (&x)[UNROLL], const V (&e)[UNROLL]) {
      block_s = block_s + ((e[0] + e[1]) + (e[2] + e[3]));
      block_t = block_t + (fmadd(e[0], x[0], e[1] * x[1]) + fmadd(e[2], x[2], e[3] * x[3]));
      if (++steps == BLOCK) flush();
    }
  };

  // Calls f(j, y) for each step of the row; y: the capped logits from j on, -inf in place of the target and past the
  // end.
  template <bool CAPPED, typename F>
  static void each_step(const T* z, int64_t v, int64_t target, const Cap& cap, F f) {
    V y[UNROLL];
    int64_t j = 0;
    for (const int64_t stop : {target / STEP * STEP, v / STEP * STEP}) {
      for (; j < stop; j += STEP) {
        load(z + j, y);
        cap.template apply_to<CAPPED>(y);
        f(j, y);
      }
      if (j >= v) break;
      const int64_t n = std::min(v - j, STEP);
      T part[STEP] = {};
      std::memcpy(part, z + j, n * sizeof(T));
      load(part, y);
      cap.template apply_to<CAPPED>(y);
      A lanes[STEP];
      for (int i = 0; i < UNROLL; ++i) y[i].store(lanes + i * LANES);
      for (int64_t k = n; k < STEP; ++k) lanes[Pair<T>::place(k)] = -INF;
      if (target >= j && target < j + n) lanes[Pair<T>::place(target - j)] = -INF;
      for (int i = 0; i < UNROLL; ++i) y[i] = V::loadu(lanes + i * LANES);
      f(j, y);
      j += STEP;
    }
  }

  static RowStats stats(const void* row, int64_t v, int64_t target, double exact, double temperature, double softcap,
                        void* exps, const void* next) {
    return (softcap < INF ? stats_of<true> : stats_of<false>)(row, v, target, exact, temperature, softcap, exps, next);
  }

  // The target is left out of the vectors and added to their sums at the end, in double, because its exact logit may
  // differ from the row's. Subtracting it from a finished sum would leave a rounding error behind if p is near 1.
  template <bool CAPPED>
  static RowStats stats_of(const void* row, int64_t v, int64_t target, double exact, double temperature,
                           double softcap, void* exps, const void* next) {
    const T* z = static_cast<const T*>(row);
    const Cap cap(softcap);
    V highest[UNROLL];
    std::fill(highest, highest + UNROLL, V(std::numeric_limits<A>::lowest()));
    each_step<false>(z, v, target, cap, [&](int64_t, const V(&y)[UNROLL]) {
      for (int i = 0; i < UNROLL; ++i) highest[i] = at::vec::clamp_min(highest[i], y[i]);
    });
    A lanes[STEP];
    for (int i = 0; i < UNROLL; ++i) highest[i].store(lanes + i * LANES);
    A most = lanes[0];
    for (A m : lanes) most = m > most ? m : most;
    double top = CAPPED ? cap.of(most) : most;
    const double y = CAPPED ? cap.of(exact) : exact;
    if (!(y <= top)) top = y;  // NaN too

    const double scale = 1 / (temperature * Power<A>::log_base);
    const V scale_v(static_cast<A>(scale)), top_v(static_cast<A>(top));
    Sums sums;
    each_step<CAPPED>(z, v, target, cap, [&](int64_t j, const V(&y)[UNROLL]) {
      V x[UNROLL], e[UNROLL];
      for (int i = 0; i < UNROLL; ++i) x[i] = exponent(y[i], top_v, scale_v);
      for (int i = 0; i < UNROLL; ++i) e[i] = Power<A>::of(x[i]);
      if (exps)
        for (int i = 0; i < UNROLL; ++i) e[i].store(static_cast<A*>(exps) + j + i * LANES);
      if (next)
        for (size_t line = 0; line < STEP * sizeof(T); line += 64)
          __builtin_prefetch(static_cast<const char*>(next) + j * sizeof(T) + line, 0, 2);
      sums.add(x, e);
    });
    sums.flush();
    const double own = (y - top) * scale;
    double sum = power(own), dot = sum == 0 ? 0 : sum * own;
    for (int l = 0; l < LANES; ++l) {
      sum += sums.s[l];
      dot += sums.t[l];
    }
    const double log_norm = std::log(sum);
    return {top, log_norm, own * Power<A>::log_base - log_norm, dot / sum * Power<A>::log_base};
  }

  static void gradient(const void* row, void* out, int64_t v, double temperature, double softcap, double max,
                       double log_norm, double a, double b, const void* exps) {
    if (a == 0 && b == 0) {
      std::memset(out, 0, v * sizeof(T));
    } else if (softcap < INF) {
      gradient_of<true, true>(row, out, v, temperature, softcap, max, log_norm, a, b, exps);
    } else if (b != 0 || !exps) {
      gradient_of<false, true>(row, out, v, temperature, softcap, max, log_norm, a, b, exps);
    } else {
      gradient_of<false, false>(row, out, v, temperature, softcap, max, log_norm, a, b, exps);
    }
  }

  // READS: whether the row itself is read.
  template <bool CAPPED, bool READS>
  static void gradient_of(const void* row, void* out, int64_t v, double temperature, double softcap, double max,
                          double log_norm, double a, double b, const void* exps) {
    const T* z = static_cast<const T*>(row);
    const A* stored = static_cast<const A*>(exps);
    T* grad = static_cast<T*>(out);
    const double scale = 1 / (temperature * Power<A>::log_base), norm = std::exp(-log_norm);
    const A a_norm = static_cast<A>(a * norm), b_norm = static_cast<A>(b * norm * Power<A>::log_base);
    const V scale_v(static_cast<A>(scale)), max_v(static_cast<A>(max)), a_v(a_norm), b_v(b_norm);
    const bool finite = std::isfinite(a_norm) && std::isfinite(b_norm) && std::isfinite(max);
    const Cap cap(softcap);
    const auto step = [&](int64_t j, const T* from, T* to) {
      V d[UNROLL];
      if constexpr (READS) load(from, d);
      for (int i = 0; i < UNROLL; ++i) {
        V slope;
        if constexpr (CAPPED) slope = cap.apply(d[i]);
        if constexpr (READS) d[i] = exponent(d[i], max_v, scale_v);
        const V e = stored ? V::loadu(stored + j + i * LANES) : Power<A>::of(d[i]);
        d[i] = e * (READS ? fmadd(b_v, d[i], a_v) : a_v);
        if constexpr (CAPPED) d[i] = d[i] * slope;
      }
      finite ? store(to, d) : store_with_nan(to, d);
    };
    int64_t j = 0;
    for (; j + STEP <= v; j += STEP) step(j, z + j, grad + j);
    if (j < v) {
      T part[STEP] = {};
      std::memcpy(part, z + j, (v - j) * sizeof(T));
      step(j, part, part);
      std::memcpy(grad + j, part, (v - j) * sizeof(T));
    }
  }

  static constexpr RowKernels kernels{&stats, &gradient};
};

}  // namespace

extern const RowKernels table[4] = {
    Row<float>::kernels, Row<at::BFloat16>::kernels, Row<at::Half>::kernels, Row<double>::kernels};

}  // namespace CPU_CAPABILITY
}  // namespace lead
