// Rewards and advantages of one group, in double, step by step as kernels/lead_kernels/advantage.py specifies.
// Means and deviations take two passes, so lengths near 14,000 that differ by one token keep their digits.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "rows.h"

namespace lead {

AdvantageOptions AdvantageOptions::decode(const double* encoded) {
  AdvantageOptions o;
  const double* next = encoded;
  o.length_reward = *next++ != 0;
  o.alpha = *next++;
  o.difficulty = *next++ != 0;
  o.weight_low = *next++;
  o.weight_high = *next++;
  o.slope = *next++;
  o.midpoint = *next++;
  o.eps = *next++;
  o.std = static_cast<Spread>(static_cast<int>(*next++));
  o.length_gate = *next++;
  o.length_min_solve_rate = *next++;
  o.nonnegative_correct = *next++ != 0;
  o.rate = static_cast<Rate>(static_cast<int>(*next++));
  o.group_filter = static_cast<Filter>(static_cast<int>(*next++));
  o.baseline = static_cast<Baseline>(static_cast<int>(*next++));
  o.length_advantage = *next++;
  o.batch_std = *next++;
  return o;
}

double difficulty_weight(const AdvantageOptions& o, double rho) {
  if (!o.difficulty) return 1;
  return o.weight_low + (o.weight_high - o.weight_low) / (1 + std::exp(o.slope * (rho - o.midpoint)));
}

GroupResult lead_group(const AdvantageOptions& o, int64_t n, const double* correct, const double* lengths,
                       const double* wrong_reward, const double* bonus, float* reward_out, float* advantage_out) {
  const double solved = std::accumulate(correct, correct + n, 0.0), solve_rate = solved / n;

  // L: z of a length over the correct responses only.
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) mean += correct[i] * lengths[i];
  mean /= std::max(solved, 1.0);
  for (int64_t i = 0; i < n; ++i) squares += correct[i] * (lengths[i] - mean) * (lengths[i] - mean);
  const double sigma = solved > 1 ? std::sqrt(squares / (solved - 1)) : 1;
  bool shaped = o.length_min_solve_rate <= 0 || solve_rate > o.length_min_solve_rate;
  if (o.length_gate > 0 && n >= 3) {
    std::vector<double> shortest(3);
    std::partial_sort_copy(lengths, lengths + n, shortest.begin(), shortest.end());
    shaped = shaped && (shortest[0] + shortest[1] + shortest[2]) / 3 > o.length_gate;
  }
  std::vector<double> z(n), reward(n), advantage(n);
  for (int64_t i = 0; i < n; ++i) {
    z[i] = (lengths[i] - mean) / (sigma + o.eps);
    const double right = shaped && o.length_reward ? std::exp(-o.alpha * z[i]) : 1;
    reward[i] = (correct[i] == 0 ? wrong_reward[i] : right) + bonus[i];
  }

  // Group-relative normalisation. Equal rewards have spread exactly 0; a group of one has mean 0 and std 1.
  const auto each = [&](auto test) { return std::all_of(reward.begin(), reward.end(), test); };
  double center = std::accumulate(reward.begin(), reward.end(), 0.0) / n;
  double baseline = center;
  if (o.baseline == AdvantageOptions::LENGTH)
    baseline = std::inner_product(lengths, lengths + n, reward.begin(), 0.0) / std::accumulate(lengths, lengths + n, 0.0);
  if (each([&](double r) { return r == reward[0]; })) center = baseline = reward[0];
  if (n == 1) center = baseline = 0;
  double spread = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double off = reward[i] - center;
    advantage[i] = reward[i] - baseline;
    spread += o.std == AdvantageOptions::MAD ? std::abs(off) : off * off;
  }
  const bool grouped = n > 1 && (o.std == AdvantageOptions::SAMPLE || o.std == AdvantageOptions::MAD);
  if (o.std == AdvantageOptions::BATCH) spread = o.batch_std;
  if (grouped) spread = o.std == AdvantageOptions::MAD ? spread / n : std::sqrt(spread / (n - 1));
  for (int64_t i = 0; i < n; ++i) {
    if (grouped || o.std == AdvantageOptions::BATCH) advantage[i] /= spread + o.eps;
    if (correct[i] != 0 && shaped) advantage[i] -= o.length_advantage * solve_rate * z[i];
  }

  // AD: w(rho) for a positive advantage, w(1 - rho) for a negative one.
  const auto positive = std::count_if(reward.begin(), reward.end(), [](double r) { return r > 0; });
  const double rho = o.rate == AdvantageOptions::POSITIVE ? static_cast<double>(positive) / n : solve_rate;
  const double weight = difficulty_weight(o, rho), inverse_weight = difficulty_weight(o, 1 - rho);
  bool kept = true;
  if (o.group_filter == AdvantageOptions::OFFICIAL)
    kept = !each([](double r) { return r <= 0; }) && !each([](double r) { return r == 1; });
  if (o.group_filter == AdvantageOptions::UNIFORM) kept = solved > 0 && solved < n;
  for (int64_t i = 0; i < n; ++i) {
    double a = advantage[i];
    a *= a > 0 ? weight : inverse_weight;
    if (o.nonnegative_correct && correct[i] != 0) a = std::max(a, 0.0);
    reward_out[i] = static_cast<float>(reward[i]);
    advantage_out[i] = kept ? static_cast<float>(a) : 0.0f;
  }
  return {rho, kept, weight};
}

}  // namespace lead
