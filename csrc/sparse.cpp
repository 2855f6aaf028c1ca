// The sparse backward on torch's vectors, compiled once per instruction set like rows.cpp.
//
// A row's threshold on p is the largest number 2^e (1 + m / 8) for which the entries below it, not counting the target,
// sum to at most `mass`. The search runs from above. A scan collects the entries over a floor, with one comparison per
// logit and one exponential for each of the few that pass. Their masses are added up in bins, eight per octave, and the
// mass below a bin is 1 - p_target less all bins above it. If the entries collected leave too much mass, the floor is
// lowered and the row scanned again, at most down to mass / v: entries below that cannot sum to more than mass.
//
// Sums run in the order of the columns, which gives the same bits on every run and with any number of threads.
#include "sparse.h"

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
using V = Vectorized<float>;

constexpr int OCTAVES = 40, BINS = 8 * OCTAVES, SHIFT = 20;  // SHIFT keeps float's exponent and 3 bits of its mantissa
constexpr std::int32_t FIRST_BIN = (127 - OCTAVES) << 3;
constexpr double FIRST_FLOOR = 1.0 / 16, NEXT_FLOOR = 1.0 / 64;

int bin_of(float p) {
  std::int32_t bits;
  std::memcpy(&bits, &p, sizeof bits);
  const std::int32_t bin = (bits >> SHIFT) - FIRST_BIN;
  return bin < 0 ? 0 : bin < BINS ? bin : BINS - 1;
}

float edge_of(int bin) {
  const std::int32_t bits = (FIRST_BIN + bin) << SHIFT;
  float p;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

template <typename T, int N>
void load(const T* z, V (&v)[N]) {
  static_assert(N % 2 == 0, "a half-precision vector holds two float vectors");
  for (int i = 0; i < N; i += 2) {
    if constexpr (std::is_same_v<T, float>) {
      v[i] = V::loadu(z + i * V::size());
      v[i + 1] = V::loadu(z + (i + 1) * V::size());
    } else {
      std::tie(v[i], v[i + 1]) = at::vec::convert_to_float<T>(Vectorized<T>::loadu(z + i * V::size()));
    }
  }
}

template <typename T>
struct Sparse {
  static constexpr int UNROLL = 4;
  static constexpr int64_t STEP = UNROLL * V::size();
  static constexpr int NONE = (1 << V::size()) - 1;

  // Collects the columns of logits >= `floor`; stops once there are more than `most`.
  static int64_t collect(const T* z, int64_t v, float floor, int64_t most, int32_t* columns) {
    const V floor_v(floor);
    int64_t n = 0, j = 0;
    for (; j + STEP <= v && n <= most; j += STEP) {
      V x[UNROLL];
      load(z + j, x);
      const V top = at::vec::maximum(at::vec::maximum(x[0], x[1]), at::vec::maximum(x[2], x[3]));
      if ((top >= floor_v).zero_mask() == NONE) continue;
      for (int i = 0; i < UNROLL; ++i)
        for (int mask = NONE & ~(x[i] >= floor_v).zero_mask(); mask; mask &= mask - 1)
          columns[n++] = static_cast<int32_t>(j + i * V::size() + __builtin_ctz(mask));
    }
    for (; j < v && n <= most; ++j)
      if (static_cast<float>(z[j]) >= floor) columns[n++] = static_cast<int32_t>(j);
    return n;
  }

  struct Softmax {
    const SparseRow& row;
    const bool capped;
    explicit Softmax(const SparseRow& r) : row(r), capped(r.softcap < std::numeric_limits<double>::infinity()) {}

    // Replaces n logits by their p; also overwrites one vector behind them.
    void probabilities(float* z, int64_t n) const {
      const V top(static_cast<float>(row.max)), scale(static_cast<float>(1 / row.temperature));
      const V norm(static_cast<float>(row.log_norm));
      const V cap(static_cast<float>(row.softcap)), inverse(static_cast<float>(1 / row.softcap));
      std::fill(z + n, z + n + V::size(), z[0]);
      for (int64_t e = 0; e < n; e += V::size()) {
        V y = V::loadu(z + e);
        if (capped) y = cap * (y * inverse).tanh();
        ((y - top) * scale - norm).exp().store(z + e);
      }
    }
    // Slightly less than the smallest logit whose probability is p.
    float logit(double p) const {
      double y = row.max + row.temperature * (std::log(p) + row.log_norm - 1e-3);
      if (capped) y = y <= -row.softcap ? -std::numeric_limits<double>::infinity() : row.softcap * std::atanh(y / row.softcap);
      return static_cast<float>(y);
    }
    double slope(T z) const {
      return capped ? std::pow(std::cosh(static_cast<double>(static_cast<float>(z)) / row.softcap), -2) : 1;
    }
  };

  static SparseEntries select(const SparseRow& row, const void* logits, int64_t v, int64_t most, const SparseRoom& room) {
    const T* z = static_cast<const T*>(logits);
    if (row.g == 0) return {0, 0, 0, 0};
    if (std::isnan(row.log_norm + row.logprob + row.g)) {  // then the whole row of d hidden is NaN
      room.columns[0] = static_cast<int32_t>(row.target);
      room.values[0] = std::numeric_limits<float>::quiet_NaN();
      return {1, 0, 0, 0};
    }
    const Softmax softmax(row);
    const double others = -std::expm1(row.logprob);
    double below = others;
    int64_t n = 0;
    int least = BINS;
    for (double floor = row.mass * FIRST_FLOOR;; floor *= NEXT_FLOOR) {
      const int lowest = bin_of(static_cast<float>(floor));
      n = collect(z, v, softmax.logit(edge_of(lowest)), most, room.candidates);
      if (n > most) return {n, 0, 0, 0};
      for (int64_t e = 0; e < n; ++e) room.masses[e] = static_cast<float>(z[room.candidates[e]]);
      softmax.probabilities(room.masses, n);
      double bins[BINS] = {};
      for (int64_t e = 0; e < n; ++e)
        if (room.candidates[e] != row.target) bins[bin_of(room.masses[e])] += room.masses[e];
      below = others;
      for (least = BINS; least > lowest && below > row.mass; --least) below -= bins[least - 1];
      if (below <= row.mass || lowest == 0 || floor * v <= row.mass) break;
    }
    const float threshold = least < BINS ? edge_of(least) : 1.0f;
    double drawn = 0;
    if (row.sample) n = draw(row, softmax, z, v, most, threshold, n, room, drawn);
    if (n > most) return {n, 0, 0, 0};

    const double scale = row.g / row.temperature;
    int64_t kept = 0, e = 0;
    const auto keep = [&](int64_t column, double d) {
      room.columns[kept] = static_cast<int32_t>(column);
      room.values[kept++] = static_cast<float>(d * softmax.slope(z[column]));
    };
    for (; e < n && room.candidates[e] < row.target; ++e)
      if (room.masses[e] >= threshold) keep(room.candidates[e], -scale * room.masses[e]);
    keep(row.target, scale * others);
    for (; e < n; ++e)
      if (room.masses[e] >= threshold && room.candidates[e] > row.target) keep(room.candidates[e], -scale * room.masses[e]);
    return {kept, std::max(below, 0.0), drawn, threshold};
  }

  // Candidates plus the entries that the draw keeps, each of which counts as the threshold. An entry below the
  // threshold is kept if u threshold < p, where u in [0, 1) is the hash of seed, row and column.
  static int64_t draw(const SparseRow& row, const Softmax& softmax, const T* z, int64_t v, int64_t most, float threshold,
                      int64_t n, const SparseRoom& room, double& drawn) {
    if (threshold <= edge_of(0)) return n;
    // Per block: p is computed only where u is below an upper bound of p / threshold, 2^k (1 + f) for 2^(k + f).
    constexpr int BLOCK = 64;
    const double to_log2 = 1.4426950408889634 / row.temperature;
    const float scale = static_cast<float>(to_log2);
    const float shift = static_cast<float>(-row.max * to_log2 - row.log_norm * 1.4426950408889634 - std::log2(threshold));
    const float margin = 1.01f * (1 << 23);
    int64_t count = 0;
    for (int64_t j = 0; j < v && count <= most; j += BLOCK) {
      const int width = static_cast<int>(std::min<int64_t>(BLOCK, v - j));
      float u[BLOCK], bound[BLOCK];
      int any = 0;
      for (int l = 0; l < width; ++l) u[l] = static_cast<float>(mix(static_cast<std::uint32_t>(j + l) ^ row.key) >> 8);
      for (int l = 0; l < width; ++l) {
        float y = static_cast<float>(z[j + l]) * scale + shift;
        y = y > -120.0f ? y : -120.0f;
        y = y < 1.0f ? y : 1.0f;
        const std::int32_t bits = static_cast<std::int32_t>((y + 127.0f) * margin);
        std::memcpy(bound + l, &bits, sizeof bits);
      }
      if (softmax.capped) std::fill(bound, bound + width, 2.0f);
      for (int l = 0; l < width; ++l) any |= u[l] * 0x1p-24f <= bound[l];
      if (!any) continue;
      for (int l = 0; l < width && count <= most; ++l) {
        if (!(u[l] * 0x1p-24f <= bound[l])) continue;
        float p[1 + V::size()] = {static_cast<float>(z[j + l])};
        softmax.probabilities(p, 1);
        if (p[0] < threshold && !(u[l] * 0x1p-24f * threshold < p[0])) continue;
        room.candidates[count] = static_cast<int32_t>(j + l);
        room.masses[count++] = std::max(p[0], threshold);
        if (p[0] < threshold && j + l != row.target) drawn += threshold;
      }
    }
    return count;
  }

  static constexpr int TILE = 8;  // vectors of a row that are summed together

  template <typename Out>
  static void sum(const int32_t* index, const float* values, int64_t n, const void* rows, int64_t stride, int64_t d,
                  Out* out, bool add) {
    const T* base = static_cast<const T*>(rows);
    constexpr int64_t WIDTH = TILE * V::size();
    int64_t k = 0;
    for (; k + WIDTH <= d; k += WIDTH) {
      V total[TILE];
      for (V& t : total) t = V(0.0f);
      for (int64_t e = 0; e < n; ++e) {
        constexpr int AHEAD = 4;
        if (e + AHEAD < n)
          for (int64_t b = 0; b < WIDTH; b += 64 / sizeof(T)) __builtin_prefetch(base + index[e + AHEAD] * stride + k + b);
        V x[TILE];
        load(base + index[e] * stride + k, x);
        const V factor(values[e]);
        for (int i = 0; i < TILE; ++i) total[i] = at::vec::fmadd(x[i], factor, total[i]);
      }
      float sums[WIDTH];
      for (int i = 0; i < TILE; ++i) total[i].store(sums + i * V::size());
      for (int64_t i = 0; i < WIDTH; ++i) out[k + i] = static_cast<Out>(add ? static_cast<float>(out[k + i]) + sums[i] : sums[i]);
    }
    for (; k < d; ++k) {
      float total = 0;
      for (int64_t e = 0; e < n; ++e) total = std::fma(static_cast<float>(base[index[e] * stride + k]), values[e], total);
      out[k] = static_cast<Out>(add ? static_cast<float>(out[k]) + total : total);
    }
  }
  static void product(const int32_t* index, const float* values, int64_t n, const void* rows, int64_t stride, int64_t d,
                      void* out) {
    sum(index, values, n, rows, stride, d, static_cast<T*>(out), false);
  }
  static void add_product(const int32_t* index, const float* values, int64_t n, const void* rows, int64_t stride, int64_t d,
                          float* out) {
    sum(index, values, n, rows, stride, d, out, true);
  }

  static double square(const void* row, int64_t d) {
    const T* x = static_cast<const T*>(row);
    V total[UNROLL];
    for (V& t : total) t = V(0.0f);
    int64_t k = 0;
    for (; k + STEP <= d; k += STEP) {
      V part[UNROLL];
      load(x + k, part);
      for (int i = 0; i < UNROLL; ++i) total[i] = at::vec::fmadd(part[i], part[i], total[i]);
    }
    float lanes[V::size()];
    ((total[0] + total[1]) + (total[2] + total[3])).store(lanes);
    double sum = 0;
    for (float lane : lanes) sum += lane;
    for (; k < d; ++k) sum += static_cast<double>(static_cast<float>(x[k])) * static_cast<float>(x[k]);
    return sum;
  }

  static constexpr SparseKernels kernels{&select, &product, &add_product, &square};
};

}  // namespace

extern const SparseKernels sparse_table[3] = {
    Sparse<float>::kernels, Sparse<at::BFloat16>::kernels, Sparse<at::Half>::kernels};

}  // namespace CPU_CAPABILITY
}  // namespace lead
