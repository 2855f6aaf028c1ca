// The row kernels, on torch's vectors. This file is compiled once for each instruction set (CPU_CAPABILITY, as torch's
// own kernels are): AVX2, AVX-512 and whatever the compiler's default is.
//
//   x = (z - max z) / temperature     log_norm = log sum exp x     mean = sum x exp x / sum exp x
//
// With a soft cap c, c tanh(z / c) stands for z throughout, and the gradient is multiplied by 1 - tanh(z / c)^2. It is a
// template's argument: rows without one pay nothing.
//
// Statistics take one look at each logit: every lane keeps its own running maximum m, s = sum exp(z - m) and
// t = sum (z - m) exp(z - m), four vectors in registers at a time, and rescales s and t where its maximum moves, which
// in random order happens about log(V) times. Subtracting before dividing by the temperature keeps an offset common to
// all logits out of the rounding. Every 16 steps the sums are added up in double, so their error does not grow with V.
// Lanes are added in their order: the same bits on every run and with any number of threads. Another instruction set
// has other lanes and may differ in the last bits.
// The gradient takes the second look and writes once, in place or beside.
//
// Floor, for B bytes a logit: B V read by the statistics, B V read and B V written by the gradient. Arithmetic is one
// exponential a logit in each, of 13 vector instructions in float.
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
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;  // accumulate in float, double for double

// Powers of `base`, so that a row's arguments are scaled once: exponents of 2 in float, of e in double.
template <typename A>
struct Power;

template <>
struct Power<float> {
  static constexpr double log_base = 0.693147180559945309417;
  static constexpr float zero = -127;  // 2^zero is exactly 0 below, as 2^-127 is not a normal number

  // 2^x for -127 <= x <= 0. n = round(x) sits in the low bits of x + 1.5 * 2^23; 2^(x-n) by a minimax polynomial of degree 6
  // that is exactly 1 at 0; n is added to the exponent's bits. Relative error below 1e-7.
  static Vectorized<float> of(const Vectorized<float>& x) {
    using V = Vectorized<float>;
    const V magic(12582912.0f);
    const V shifted = x + magic;
    const V f = x - (shifted - magic);
    V p(C6);
    p = fmadd(p, f, V(C5));
    p = fmadd(p, f, V(C4));
    p = fmadd(p, f, V(C3));
    p = fmadd(p, f, V(C2));
    p = fmadd(p, f, V(C1));
    p = fmadd(p, f, V(1.0f));
    const auto exponent = at::vec::cast<int32_t>(shifted) << Vectorized<int32_t>(23);
    return at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
  }
  static float of(float x) { return x <= zero ? 0.0f : std::exp2(x); }

  static constexpr float C1 = 0.693147182f, C2 = 0.240226477f, C3 = 0.0555033237f, C4 = 0.00961843785f, C5 = 0.00133988878f, C6 = 0.000153533518f;
};

template <>
struct Power<double> {
  static constexpr double log_base = 1;
  static constexpr double zero = -746;  // exp(zero) is 0
  static Vectorized<double> of(const Vectorized<double>& x) { return x.exp(); }
  static double of(double x) { return std::exp(x); }
};

// tanh(u) and its derivative. In float tanh(u) = 1 - 2 q with q = e / (1 + e), e = exp(-2 |u|), and below 0.55, where
// that would cancel, u times a minimax polynomial in u^2: at most 2 units in the last place. The derivative 4 q (1 - q)
// keeps its digits where tanh is 1 but for rounding. All sums are explicit multiply-adds, so that the compiler cannot fuse
// one differently in another place: a row's maximum must have the same bits wherever it is computed.
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

constexpr int UNROLL = 4;
constexpr int BLOCK = 16;  // steps whose sums are kept apart

template <typename T>
struct Row {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  static constexpr int64_t STEP = UNROLL * V::size();

  static void load(const T* z, V (&v)[UNROLL]) {
    if constexpr (std::is_same_v<T, A>) {
      for (int i = 0; i < UNROLL; ++i) v[i] = V::loadu(z + i * V::size());
    } else {
      for (int i = 0; i < UNROLL; i += 2)
        std::tie(v[i], v[i + 1]) = at::vec::convert_to_float<T>(Vectorized<T>::loadu(z + i * V::size()));
    }
  }
  // The first n of STEP logits, and zeros.
  static void load(const T* z, int64_t n, V (&v)[UNROLL]) {
    T part[STEP] = {};
    std::memcpy(part, z, n * sizeof(T));
    load(part, v);
  }
  static void store(T* z, const V (&v)[UNROLL]) {
    if constexpr (std::is_same_v<T, A>) {
      for (int i = 0; i < UNROLL; ++i) v[i].store(z + i * V::size());
    } else {
      for (int i = 0; i < UNROLL; i += 2) at::vec::convert_from_float<T>(v[i], v[i + 1]).store(z + i * V::size());
    }
  }

  struct Cap {
    V cap, inverse;
    explicit Cap(double softcap) : cap(static_cast<A>(softcap)), inverse(static_cast<A>(1 / softcap)) {}
    // Puts y for a vector of logits; returns dy/dz.
    V apply(V& z) const {
      const auto t = tanh_of(z * inverse);
      z = fmadd(cap, t.value, V(A(0)));  // rounded before anything is subtracted from it
      return t.slope;
    }
  };

  // The exponent that a logit has below the maximum; NaN stays NaN.
  static V exponent(const V& z, const V& max, const V& scale) {
    return at::vec::clamp_min((z - max) * scale, V(Power<A>::zero));
  }

  struct Sums {
    static constexpr int LANES = V::size();
    V max{std::numeric_limits<A>::lowest()}, block_s{A(0)}, block_t{A(0)};
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
    // Moves every lane's maximum to `higher`: exp(z - higher) = exp(z - max) factor, factor = exp(max - higher).
    void rescale(const V& higher, const V& scale) {
      flush();
      const V x = exponent(max, higher, scale);
      A moved[LANES], factor[LANES];
      x.store(moved);
      Power<A>::of(x).store(factor);
      for (int l = 0; l < LANES; ++l) t[l] = factor[l] * (t[l] + s[l] * moved[l]);
      for (int l = 0; l < LANES; ++l) s[l] = factor[l] * s[l];
      max = higher;
    }
    void add(const V (&z)[UNROLL], const V& scale) {
      const V top = at::vec::clamp_min(at::vec::clamp_min(z[0], z[1]), at::vec::clamp_min(z[2], z[3]));
      if ((top > max).zero_mask() != (1 << LANES) - 1) rescale(at::vec::clamp_min(max, top), scale);
      V x[UNROLL], e[UNROLL];
      for (int i = 0; i < UNROLL; ++i) x[i] = exponent(z[i], max, scale);
      for (int i = 0; i < UNROLL; ++i) e[i] = Power<A>::of(x[i]);
      block_s = block_s + ((e[0] + e[1]) + (e[2] + e[3]));
      block_t = block_t + (fmadd(e[0], x[0], e[1] * x[1]) + fmadd(e[2], x[2], e[3] * x[3]));
      if (++steps == BLOCK) flush();
    }
  };

  static RowStats stats(const void* row, int64_t v, int64_t target, double exact, double temperature, double softcap) {
    return (softcap < std::numeric_limits<double>::infinity() ? stats_of<true> : stats_of<false>)(
        row, v, target, exact, temperature, softcap);
  }

  // The target is left out of the vectors and joins their sums at the end, in double: it may have another logit than the
  // row has, and taken out of a sum afterwards it would leave the rounding of p near 1 behind.
  template <bool CAPPED>
  static RowStats stats_of(const void* row, int64_t v, int64_t target, double exact, double temperature,
                           double softcap) {
    const T* z = static_cast<const T*>(row);
    const Cap cap(softcap);
    const double scale = 1 / (temperature * Power<A>::log_base);
    const V scale_v(static_cast<A>(scale));
    Sums sums;
    V part[UNROLL];
    // Adds z[j .. j + STEP) to the sums, but for the target and what is past the row's end.
    const auto add_some = [&](int64_t j) {
      A some[STEP];
      load(z + j, std::min(v - j, STEP), part);
      for (int i = 0; i < UNROLL; ++i) {
        if constexpr (CAPPED) cap.apply(part[i]);
        part[i].store(some + i * V::size());
      }
      std::fill(some + std::min(v - j, STEP), some + STEP, -std::numeric_limits<A>::infinity());
      if (target >= j && target < j + STEP) some[target - j] = -std::numeric_limits<A>::infinity();
      for (int i = 0; i < UNROLL; ++i) part[i] = V::loadu(some + i * V::size());
      sums.add(part, scale_v);
    };
    int64_t j = 0;
    for (const int64_t stop : {target / STEP * STEP, v / STEP * STEP}) {
      for (; j < stop; j += STEP) {
        load(z + j, part);
        if constexpr (CAPPED)
          for (V& x : part) cap.apply(x);
        sums.add(part, scale_v);
      }
      if (j < v) add_some(j);
      j += STEP;
    }
    sums.flush();

    A max[V::size()];
    sums.max.store(max);
    const double y = CAPPED ? capped(exact, softcap) : exact;
    double top = y;
    for (A m : max) top = m > top ? m : top;
    const double own = (y - top) * scale;
    double sum = power(own), dot = sum == 0 ? 0 : sum * own;
    for (int l = 0; l < V::size(); ++l) {
      const double x = std::max((double(max[l]) - top) * scale, double(Power<A>::zero));
      const double factor = power(x);
      sum += factor * sums.s[l];
      dot += factor * (sums.t[l] + x * sums.s[l]);
    }
    const double log_norm = std::log(sum);
    return {top, log_norm, own * Power<A>::log_base - log_norm, dot / sum * Power<A>::log_base};
  }

  // base^x; 0 where it is as good as that, NaN for NaN.
  static double power(double x) { return x <= Power<A>::zero ? 0 : std::exp(x * Power<A>::log_base); }

  static void gradient(const void* row, void* out, int64_t v, double temperature, double softcap, double max,
                       double log_norm, double a, double b) {
    (softcap < std::numeric_limits<double>::infinity() ? gradient_of<true> : gradient_of<false>)(
        row, out, v, temperature, softcap, max, log_norm, a, b);
  }

  template <bool CAPPED>
  static void gradient_of(const void* row, void* out, int64_t v, double temperature, double softcap, double max,
                          double log_norm, double a, double b) {
    const T* z = static_cast<const T*>(row);
    T* grad = static_cast<T*>(out);
    if (a == 0 && b == 0) {
      std::memset(out, 0, v * sizeof(T));
      return;
    }
    const double scale = 1 / (temperature * Power<A>::log_base), norm = std::exp(-log_norm);
    const V scale_v(static_cast<A>(scale)), max_v(static_cast<A>(max));
    const V a_v(static_cast<A>(a * norm)), b_v(static_cast<A>(b * norm * Power<A>::log_base));
    const Cap cap(softcap);
    const auto step = [&](const T* from, T* to) {
      V x[UNROLL];
      load(from, x);
      for (V& d : x) {
        V slope;
        if constexpr (CAPPED) slope = cap.apply(d);
        d = exponent(d, max_v, scale_v);
        d = Power<A>::of(d) * fmadd(b_v, d, a_v);
        if constexpr (CAPPED) d = d * slope;
      }
      store(to, x);
    };
    int64_t j = 0;
    for (; j + STEP <= v; j += STEP) step(z + j, grad + j);
    if (j < v) {
      T tail[STEP];
      std::fill(tail, tail + STEP, z[j]);
      std::memcpy(tail, z + j, (v - j) * sizeof(T));
      step(tail, tail);
      std::memcpy(grad + j, tail, (v - j) * sizeof(T));
    }
  }

  // y of a logit, with the bits that it would have in a vector.
  static double capped(double z, double softcap) {
    V y(static_cast<A>(z));
    Cap(softcap).apply(y);
    A lanes[V::size()];
    y.store(lanes);
    return lanes[0];
  }

  static constexpr RowKernels kernels{&stats, &gradient};
};

}  // namespace

extern const RowKernels table[4] = {
    Row<float>::kernels, Row<at::BFloat16>::kernels, Row<at::Half>::kernels, Row<double>::kernels};

}  // namespace CPU_CAPABILITY
}  // namespace lead
