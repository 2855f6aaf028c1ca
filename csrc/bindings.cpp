// The one file that knows torch and Python: two operators on a CPU, rows shared out over torch's threads.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <tuple>

#include "rows.h"

namespace {

using at::Tensor;

void check(const Tensor& logits, const Tensor& targets) {
  TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1, "logits must be [T, V] with V contiguous");
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == logits.size(0) && targets.is_contiguous() &&
                  targets.scalar_type() == at::kLong,
              "targets must be int64 [T]");
}

// f(row pointer, row index) for every row, in float32 or bfloat16 (as its bits).
template <typename F>
void each_row(const Tensor& logits, F f) {
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  auto run = [&](auto* base) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(base + i * stride, i);
    });
  };
  if (logits.scalar_type() == at::kFloat) {
    run(logits.data_ptr<float>());
  } else {
    TORCH_CHECK(logits.scalar_type() == at::kBFloat16, "logits must be float32 or bfloat16");
    run(reinterpret_cast<uint16_t*>(logits.data_ptr<at::BFloat16>()));
  }
}

// -> stats float32 [T, 4] (max, log_norm, logprob, entropy)
Tensor row_stats(const Tensor& logits, const Tensor& targets, double temperature) {
  check(logits, targets);
  Tensor out = at::empty({logits.size(0), 4}, logits.options().dtype(at::kFloat));
  auto* stats = reinterpret_cast<lead::RowStats*>(out.data_ptr<float>());
  const int64_t* target = targets.data_ptr<int64_t>();
  const int64_t v = logits.size(1);
  for (int64_t i = 0; i < targets.size(0); ++i)
    TORCH_CHECK_VALUE(target[i] >= 0 && target[i] < v, "target ", target[i], " is outside the vocabulary of ", v);
  each_row(logits, [&](auto* z, int64_t i) {
    stats[i] = lead::row_stats(z, v, target[i], static_cast<float>(temperature));
  });
  return out;
}

// logits become their gradient
void row_gradient_(const Tensor& logits, const Tensor& targets, const Tensor& stats, const Tensor& grad_logprob,
                   const Tensor& grad_entropy, double temperature) {
  check(logits, targets);
  TORCH_CHECK(stats.is_contiguous() && grad_logprob.is_contiguous() && grad_entropy.is_contiguous() &&
                  stats.scalar_type() == at::kFloat && grad_logprob.scalar_type() == at::kFloat &&
                  grad_entropy.scalar_type() == at::kFloat,
              "stats and gradients must be contiguous float32");
  const auto* s = reinterpret_cast<const lead::RowStats*>(stats.data_ptr<float>());
  const float *g = grad_logprob.data_ptr<float>(), *h = grad_entropy.data_ptr<float>();
  const int64_t* target = targets.data_ptr<int64_t>();
  const int64_t v = logits.size(1);
  each_row(logits, [&](auto* z, int64_t i) {
    lead::row_gradient(z, v, target[i], static_cast<float>(temperature), s[i], g[i], h[i]);
  });
}

}  // namespace

TORCH_LIBRARY(lead_kernels_cpu, m) {
  m.def("row_stats(Tensor logits, Tensor targets, float temperature) -> Tensor");
  m.def(
      "row_gradient_(Tensor(a!) logits, Tensor targets, Tensor stats, Tensor grad_logprob, Tensor grad_entropy, "
      "float temperature) -> ()");
}
TORCH_LIBRARY_IMPL(lead_kernels_cpu, CPU, m) {
  m.impl("row_stats", row_stats);
  m.impl("row_gradient_", row_gradient_);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "CPU operators of lead_kernels, registered with torch on import"; }
