// The loss of one row, in double, step by step as `rows_loss` of kernels/lead_kernels/policy_loss.py specifies.
#include <algorithm>
#include <cmath>

#include "rows.h"

namespace lead {

constexpr double LOG_RATIO_CAP = 20;  // as in records.py
constexpr double NONE = HUGE_VAL;

LossOptions LossOptions::decode(const double* encoded, double low, double high) {
  LossOptions o;
  const double* next = encoded;
  o.ratio = static_cast<Ratio>(static_cast<int>(*next++));
  next += 2;  // clip_low and clip_high: already in low and high
  o.low = low;
  o.high = high;
  o.dual_clip = *next++;
  o.delta = *next++;
  o.sapo_positive = *next++;
  o.sapo_negative = *next++;
  o.importance_cap = *next++;
  o.importance_mode = static_cast<Excess>(static_cast<int>(*next++));
  ++next;  // importance_level: sequence terms arrive in RowTerms
  o.kl = static_cast<Estimator>(static_cast<int>(*next++));
  o.kl_coef = *next++;
  o.entropy_coef = *next++;
  return o;
}

namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The smaller of two numbers, or NaN if one is NaN.
double least(double a, double b) { return a < b || std::isnan(a) ? a : b; }

}  // namespace

RowLoss row_loss(const LossOptions& o, const RowTerms& row) {
  const double logprob = row.logprob, a = row.advantage, old = row.old ? *row.old : logprob;
  const double log_r = row.log_ratio ? *row.log_ratio : logprob - old;
  const bool capped = log_r > LOG_RATIO_CAP;
  const double r = std::exp(capped ? LOG_RATIO_CAP : log_r);
  const bool below = r < o.low, above = r > o.high;
  const double clipped = below ? o.low : above ? o.high : r;
  double loss, g;
  if (o.ratio == LossOptions::CISPO) {
    loss = -clipped * a * logprob;
    g = -clipped * a;
  } else if (o.ratio == LossOptions::SAPO) {
    const double tau = a > 0 ? o.sapo_positive : o.sapo_negative, x = tau * (r - 1);
    loss = -a * (4 / tau) * sigmoid(x);
    g = -a * (capped ? 0 : 4 * r * sigmoid(x) * sigmoid(-x));
  } else {
    loss = -least((r > o.delta ? o.delta : r) * a, clipped * a);
    bool constant = (a > 0 ? above : below) || capped || r > o.delta;
    if (a < 0 && loss > -o.dual_clip * a) {
      loss = -o.dual_clip * a;
      constant = true;
    }
    g = (constant ? 0 : -r) * a;  // 0 a, not 0, to keep NaN
  }
  bool truncated = false;
  if (o.importance_cap != NONE && row.behavior) {
    const double log_w = row.importance ? *row.importance : old - *row.behavior;
    double w = std::exp(log_w > LOG_RATIO_CAP ? LOG_RATIO_CAP : log_w);
    truncated = w > o.importance_cap;
    if (truncated) w = o.importance_mode == LossOptions::MASK ? 0 : o.importance_cap;
    loss *= w;
    g *= w;
  }
  double kl = 0;
  if (row.reference && o.kl_coef != 0) {
    const double d = *row.reference - logprob;
    double slope;
    if (o.kl == LossOptions::K1) {
      kl = -d;
      slope = 1;
    } else if (o.kl == LossOptions::K2) {
      kl = d * d / 2;
      slope = -d;
    } else {
      const bool far = d > LOG_RATIO_CAP;
      kl = std::exp(far ? LOG_RATIO_CAP : d) - 1 - d;
      slope = far ? 1 : -std::expm1(d);
    }
    loss += o.kl_coef * kl;
    g += o.kl_coef * slope;
  }
  loss -= o.entropy_coef * row.entropy;

  const double u = row.weight, diff = row.behavior ? logprob - *row.behavior : 0;
  const double near = diff > LOG_RATIO_CAP ? LOG_RATIO_CAP : diff < -LOG_RATIO_CAP ? -LOG_RATIO_CAP : diff;
  return {u * loss,
          u * g,
          -o.entropy_coef * u,
          {std::expm1(near) - near, below && a < 0 && u != 0 ? 1.0 : 0.0, above && a > 0 && u != 0 ? 1.0 : 0.0, r,
           capped ? 1.0 : 0.0, truncated ? 1.0 : 0.0, std::abs(diff), kl}};
}

}  // namespace lead
