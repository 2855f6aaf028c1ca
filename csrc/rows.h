// What the loss needs of one row of logits, the gradient of that row (rows.cpp), and the loss itself (row_loss.cpp).
#pragma once
#include <cstdint>

namespace lead {

// Of x = (y - max) / temperature, where y = softcap tanh(z / softcap), or the logit z itself where softcap is infinity;
// in double whatever the logits' dtype.
struct RowStats {
  double max;       // of y
  double log_norm;  // log sum exp x, never below 0
  double logprob;   // x of the target - log_norm, never above 0
  double mean;      // sum p x, never above 0; the entropy is log_norm - mean
};

struct RowKernels {
  // Of a row of v logits, of which `exact` stands for that of the target. exps: room for v + ROOM numbers (float, or
  // double for double), where exp x of every logit is left for `gradient`; next: the row to ask the cache for; either
  // may be null.
  RowStats (*stats)(const void* row, int64_t v, int64_t target, double exact, double temperature, double softcap,
                    void* exps, const void* next);
  // out[j] = p_j (a + b x_j) dy/dz; out may be row. A probability that underflows, as that of a logit of -inf without a
  // soft cap does, gives exactly 0. exps: what `stats` left, or null.
  void (*gradient)(const void* row, void* out, int64_t v, double temperature, double softcap, double max,
                   double log_norm, double a, double b, const void* exps);
};

constexpr int64_t ROOM = 64;  // logits in the longest step of any instruction set

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

// LossOptions of kernels/lead_kernels/options.py, which says what each means; here in the order in which `encode` there
// writes them, infinity for none. Fields after the last one here are none of a row's concern.
struct LossOptions {
  enum Ratio { TOKEN, SEQUENCE, CISPO, SAPO } ratio;
  double low, high;  // LossOptions.clip_range
  double dual_clip, delta, sapo_positive, sapo_negative, importance_cap;
  enum Excess { TRUNCATE, MASK } importance_mode;
  enum Estimator { K1, K2, K3 } kl;
  double kl_coef, entropy_coef;

  static constexpr int SIZE = 13;  // numbers that `decode` reads
  static LossOptions decode(const double* encoded, double low, double high);
};

// What is known of a row's token besides its logits. NaN is a value; what is absent is null.
struct RowTerms {
  double logprob, entropy, advantage, weight;
  const double *behavior, *old, *reference, *log_ratio, *importance;
};

// Loss, its derivatives by log-prob and entropy, and the metrics in the order of RowMetrics (records.py).
struct RowLoss {
  static constexpr int METRICS = 8;
  double loss, grad_logprob, grad_entropy, metrics[METRICS];
};
RowLoss row_loss(const LossOptions& o, const RowTerms& row);

// AdvantageOptions of kernels/lead_kernels/options.py, which says what each means; here in the order in which `encode`
// there writes them.
struct AdvantageOptions {
  bool length_reward;
  double alpha;
  bool difficulty;
  double weight_low, weight_high, slope, midpoint, eps;
  enum Spread { SAMPLE, NONE, MAD } std;
  double length_gate, length_min_solve_rate;
  bool nonnegative_correct;
  enum Rate { CORRECT, POSITIVE } rate;
  enum Filter { KEEP_ALL, OFFICIAL, UNIFORM } group_filter;

  static constexpr int SIZE = 14;  // numbers that `decode` reads
  static AdvantageOptions decode(const double* encoded);
};

// The difficulty weight w(rho); 1 where AD is off.
double difficulty_weight(const AdvantageOptions& o, double rho);

// One group of n responses: correct, lengths, wrong_reward and bonus hold n numbers each, and so do the outputs.
struct GroupResult {
  double solve_rate;
  bool kept;
  double weight;
};
GroupResult lead_group(const AdvantageOptions& o, int64_t n, const double* correct, const double* lengths,
                       const double* wrong_reward, const double* bonus, float* reward, float* advantage);

}  // namespace lead
