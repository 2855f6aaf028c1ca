// Statistics of one row of logits that the loss needs, the gradient of that row (rows.cpp), and the loss
// (row_loss.cpp).
#pragma once
#include <cstdint>

namespace lead {

// Statistics of x = (y - max) / temperature, where y = softcap tanh(z / softcap), or the logit z itself if softcap is
// infinity; in double whatever the dtype of the logits.
struct RowStats {
  double max;       // of y
  double log_norm;  // log sum exp x, never below 0
  double logprob;   // x of the target - log_norm, never above 0
  double mean;      // sum p x, never above 0; the entropy is log_norm - mean
};

struct RowKernels {
  // Computes the statistics of a row of v logits, with `exact` as the target's. exps: buffer of v + ROOM numbers
  // (float, or double for double) that receives exp x of every logit for `gradient`; next: the row to prefetch. Either
  // may be null.
  RowStats (*stats)(const void* row, int64_t v, int64_t target, double exact, double temperature, double softcap,
                    void* exps, const void* next);
  // Writes out[j] = p_j (a + b x_j) dy/dz; out may be row. A probability that underflows, such as that of a logit of
  // -inf without a soft cap, gives exactly 0. exps: the buffer that `stats` filled, or null.
  void (*gradient)(const void* row, void* out, int64_t v, double temperature, double softcap, double max,
                   double log_norm, double a, double b, const void* exps);
};

constexpr int64_t ROOM = 64;  // logits in the longest step of any instruction set

// One entry per dtype (float, bfloat16, half, double), for each instruction set that rows.cpp is compiled for.
namespace DEFAULT {
extern const RowKernels table[4];
}
namespace AVX2 {
extern const RowKernels table[4];
}
namespace AVX512 {
extern const RowKernels table[4];
}

// LossOptions of kernels/lead_kernels/options.py, which documents each field, in the order in which `encode` writes
// them, with infinity for none. Later fields do not matter to a row.
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

// What is known of a row's token besides its logits. Absent values are null; NaN is a value.
struct RowTerms {
  double logprob, entropy, advantage, weight;
  const double *behavior, *old, *reference, *log_ratio, *importance;
};

// Loss, its derivatives with respect to log-prob and entropy, and metrics in the order of RowMetrics (records.py).
struct RowLoss {
  static constexpr int METRICS = 8;
  double loss, grad_logprob, grad_entropy, metrics[METRICS];
};
RowLoss row_loss(const LossOptions& o, const RowTerms& row);

// AdvantageOptions of kernels/lead_kernels/options.py, which documents each field, in the order in which `encode`
// writes them.
struct AdvantageOptions {
  bool length_reward;
  double alpha;
  bool difficulty;
  double weight_low, weight_high, slope, midpoint, eps;
  enum Spread { SAMPLE, NONE, MAD, BATCH } std;
  double length_gate, length_min_solve_rate;
  bool nonnegative_correct;
  enum Rate { CORRECT, POSITIVE } rate;
  enum Filter { KEEP_ALL, OFFICIAL, UNIFORM } group_filter;
  enum Baseline { MEAN, LENGTH } baseline;
  double length_advantage, batch_std;

  static constexpr int SIZE = 17;  // numbers that `decode` reads
  static AdvantageOptions decode(const double* encoded);
};

// The difficulty weight w(rho); 1 if AD is off.
double difficulty_weight(const AdvantageOptions& o, double rho);

// Computes one group of n responses; correct, lengths, wrong_reward, bonus and the outputs hold n numbers each.
struct GroupResult {
  double solve_rate;
  bool kept;
  double weight;
};
GroupResult lead_group(const AdvantageOptions& o, int64_t n, const double* correct, const double* lengths,
                       const double* wrong_reward, const double* bonus, float* reward, float* advantage);

}  // namespace lead
