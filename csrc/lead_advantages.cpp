// Rewards and advantages of one group, in double: what kernels/lead_kernels/lead_advantage.py specifies, step by step.
// Means and deviations take two passes, so lengths near 14,000 that differ by a token keep their digits.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "rows.h"

namespace lead {

GroupResult lead_group(const AdvantageOptions& o, const double* correct, const double* lengths, const double* wrong_reward,
                       const double* penalty, float* reward_out, float* advantage_out) {
  const int64_t n = o.group_size;
  const double solved = std::accumulate(correct, correct + n, 0.0), share = solved / n;

  // L: z of a length over the correct responses only.
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) mean += correct[i] * lengths[i];
  mean /= std::max(solved, 1.0);
  for (int64_t i = 0; i < n; ++i) squares += correct[i] * (lengths[i] - mean) * (lengths[i] - mean);
  const double sigma = solved > 1 ? std::sqrt(squares / (solved - 1)) : 1;
  bool shaped = o.length_reward && (o.length_min_solve_rate <= 0 || share > o.length_min_solve_rate);
  if (o.length_gate > 0 && n >= 3) {
    std::vector<double> shortest(3);
    std::partial_sort_copy(lengths, lengths + n, shortest.begin(), shortest.end());
    shaped = shaped && (shortest[0] + shortest[1] + shortest[2]) / 3 > o.length_gate;
  }
  std::vector<double> reward(n), advantage(n);
  for (int64_t i = 0; i < n; ++i) {
    const double z = (lengths[i] - mean) / (sigma + o.eps);
    reward[i] = correct[i] == 0 ? wrong_reward[i] : o.correct_reward * (shaped ? std::exp(-o.alpha * z) : 1);
    if (penalty) reward[i] += penalty[i];
  }

  // Group-relative normalisation. Equal rewards have spread exactly 0; a group of one has mean 0 and std 1.
  const auto each = [&](auto test) { return std::all_of(reward.begin(), reward.end(), test); };
  double center = std::accumulate(reward.begin(), reward.end(), 0.0) / n;
  if (each([&](double r) { return r == reward[0]; })) center = reward[0];
  if (n == 1) center = 0;
  double spread = 0;
  for (int64_t i = 0; i < n; ++i) {
    advantage[i] = reward[i] - center;
    spread += o.std == AdvantageOptions::MAD ? std::abs(advantage[i]) : advantage[i] * advantage[i];
  }
  if (n > 1 && o.std != AdvantageOptions::NONE) {
    spread = o.std == AdvantageOptions::MAD ? spread / n : std::sqrt(spread / (n - 1));
    for (double& a : advantage) a /= spread + o.eps;
  }

  // AD: the weight's argument turns with the sign of the advantage.
  const auto positive = std::count_if(reward.begin(), reward.end(), [](double r) { return r > 0; });
  const double rho = o.rate_positive ? static_cast<double>(positive) / n : share;
  const auto weight = [&](double r) {
    return o.weight_low + (o.weight_high - o.weight_low) / (1 + std::exp(o.slope * (r - o.midpoint)));
  };
  bool kept = true;
  if (o.group_filter == AdvantageOptions::OFFICIAL)
    kept = !each([](double r) { return r <= 0; }) && !each([&](double r) { return r == o.correct_reward; });
  if (o.group_filter == AdvantageOptions::UNIFORM) kept = solved > 0 && solved < n;
  for (int64_t i = 0; i < n; ++i) {
    double a = advantage[i];
    if (o.difficulty) a *= weight(a > 0 ? rho : 1 - rho);
    if (o.nonnegative_correct && correct[i] != 0) a = std::max(a, 0.0);
    reward_out[i] = static_cast<float>(reward[i]);
    advantage_out[i] = kept ? static_cast<float>(a) : 0.0f;
  }
  return {rho, kept};
}

}  // namespace lead
