// What the loss needs of one row of logits, and the gradient of that row. See rows.cpp.
#pragma once
#include <cstdint>

namespace lead {

// Of x = (z - max) / temperature, in double whatever the logits' dtype.
struct RowStats {
  double max;       // of the raw logits
  double log_norm;  // log sum exp x, never below 0
  double mean;      // sum p x, never above 0; the entropy is log_norm - mean
};

struct RowKernels {
  // One pass over a row of v logits.
  RowStats (*stats)(const void* row, int64_t v, double temperature);
  // out[j] = p_j (a + b x_j); out may be row. A probability that underflows, as that of a logit of -inf does, gives
  // exactly 0.
  void (*gradient)(const void* row, void* out, int64_t v, double temperature, double max, double log_norm, double a,
                   double b);
};

// By dtype (float, bfloat16, half, double), for each instruction set that rows.cpp is compiled for.
namespace DEFAULT {
extern const RowKernels table[4];
}
namespace AVX2 {
extern const RowKernels table[4];
}
namespace AVX512 {
extern const RowKernels table[4];
}

// Options of lead_advantages: kernels/lead_kernels/lead_advantage.py says what each means.
struct AdvantageOptions {
  int64_t group_size;
  double alpha, correct_reward;
  bool length_reward, difficulty;
  double weight_low, weight_high, slope, midpoint, eps;
  enum Spread : int64_t { NONE, SAMPLE, MAD } std;
  double length_gate, length_min_solve_rate;
  bool nonnegative_correct, rate_positive;
  enum Filter : int64_t { KEEP_ALL, OFFICIAL, UNIFORM } group_filter;
};

// One group: correct, lengths, wrong_reward and, where not null, penalty hold group_size numbers; so do the outputs.
struct GroupResult {
  double solve_rate;
  bool kept;
};
GroupResult lead_group(const AdvantageOptions& o, const double* correct, const double* lengths, const double* wrong_reward,
                       const double* penalty, float* reward, float* advantage);

}  // namespace lead
