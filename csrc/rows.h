// Row kernels on a CPU: log-sum-exp, log-prob of the target, entropy, and the gradient over the logits.
//
//   x = (z - max z) / temperature    log_norm = log sum exp x    logp = x_t - log_norm    H = log_norm - sum x e^x / sum e^x
//   d z = (g (onehot_t - p) - h p (log p + H)) / temperature
//
// Logits float32 or bfloat16, arithmetic float32 in 16 lanes added up in a fixed order: the same bits on every run, with any
// number of threads and any instruction set. Floor: one read of V logits for the statistics, one read and one write for
// the gradient; the second look of the statistics hits the cache.
#pragma once
#include <cstdint>

namespace lead {

struct RowStats {
  float max;       // of the raw logits
  float log_norm;  // log sum exp of the shifted, scaled logits
  float logprob;
  float entropy;
};

RowStats row_stats(const float* z, int64_t vocabulary, int64_t target, float temperature);
RowStats row_stats(const uint16_t* z, int64_t vocabulary, int64_t target, float temperature);

// Overwrites the row z with its gradient; g and h are d loss / d logprob and d loss / d entropy.
void row_gradient(float* z, int64_t vocabulary, int64_t target, float temperature, const RowStats& s, float g, float h);
void row_gradient(uint16_t* z, int64_t vocabulary, int64_t target, float temperature, const RowStats& s, float g, float h);

}  // namespace lead
