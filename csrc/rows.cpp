// See rows.h. Plain loops over 16 lanes that the compiler turns into vectors; one clone per instruction set, chosen when
// the library is loaded.
#include "rows.h"

#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace lead {
namespace {

constexpr int kLanes = 16;

INLINE float load(const float* p) { return *p; }
INLINE float load(const uint16_t* p) {  // bfloat16
  uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE void store(float* p, float x) { *p = x; }
INLINE void store(uint16_t* p, float x) {  // bfloat16, to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *p = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// exp of x <= 0, relative error below 2e-7; exp(-87.3) stands for all that is smaller.
INLINE float exp_nonpositive(float x) {
  x = x < -87.3f ? -87.3f : x;
  float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

template <typename T>
INLINE RowStats stats(const T* z, int64_t v, int64_t target, float temperature) {
  float top[kLanes], sum[kLanes] = {}, dot[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) top[l] = -std::numeric_limits<float>::infinity();
  const int64_t whole = v - v % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      float x = load(z + j + l);
      top[l] = x > top[l] ? x : top[l];
    }
  for (int64_t j = whole; j < v; ++j) top[j - whole] = std::fmax(top[j - whole], load(z + j));
  float m = top[0];
  for (int l = 1; l < kLanes; ++l) m = top[l] > m ? top[l] : m;

  const float scale = 1.0f / temperature;
  for (int64_t j = 0; j < whole; j += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      float x = (load(z + j + l) - m) * scale;
      x = x < -87.3f ? -87.3f : x;  // a logit of -inf has weight 0, not NaN
      float e = exp_nonpositive(x);
      sum[l] += e;
      dot[l] += x * e;
    }
  for (int64_t j = whole; j < v; ++j) {
    float x = (load(z + j) - m) * scale;
    x = x < -87.3f ? -87.3f : x;
    float e = exp_nonpositive(x);
    sum[j - whole] += e;
    dot[j - whole] += x * e;
  }
  float s = 0, d = 0;
  for (int l = 0; l < kLanes; ++l) {
    s += sum[l];
    d += dot[l];
  }
  const float log_norm = std::log(s);
  float entropy = log_norm - d / s;
  return {m, log_norm, (load(z + target) - m) * scale - log_norm, entropy < 0 ? 0.0f : entropy};
}

template <typename T>
INLINE void gradient(T* z, int64_t v, int64_t target, float temperature, const RowStats& s, float g, float h) {
  const float scale = 1.0f / temperature, shift = s.entropy - s.log_norm, a = -g * scale, b = -h * scale;
  const float at_target = load(z + target);
  const int64_t whole = v - v % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      float x = (load(z + j + l) - s.max) * scale;
      x = x < -87.3f ? -87.3f : x;
      float y = x - s.log_norm;
      float p = exp_nonpositive(y > 0 ? 0 : y);
      p = x == -87.3f ? 0.0f : p;
      store(z + j + l, p * (a + b * (x + shift)));
    }
  auto one = [&](float raw, float onehot) {
    float x = (raw - s.max) * scale;
    x = x < -87.3f ? -87.3f : x;
    float y = x - s.log_norm;
    float p = x == -87.3f ? 0.0f : exp_nonpositive(y > 0 ? 0 : y);
    return p * (a + b * (x + shift)) + onehot * g * scale;
  };
  for (int64_t j = whole; j < v; ++j) store(z + j, one(load(z + j), 0.0f));
  store(z + target, one(at_target, 1.0f));
}

}  // namespace

CLONES RowStats row_stats(const float* z, int64_t v, int64_t t, float temperature) { return stats(z, v, t, temperature); }
CLONES RowStats row_stats(const uint16_t* z, int64_t v, int64_t t, float temperature) {
  return stats(z, v, t, temperature);
}
CLONES void row_gradient(float* z, int64_t v, int64_t t, float temperature, const RowStats& s, float g, float h) {
  gradient(z, v, t, temperature, s, g, h);
}
CLONES void row_gradient(uint16_t* z, int64_t v, int64_t t, float temperature, const RowStats& s, float g, float h) {
  gradient(z, v, t, temperature, s, g, h);
}

}  // namespace lead
