// The one file that knows torch and Python: operators on CPU tensors, rows shared out over torch's threads.
#include <Python.h>

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "rows.h"

namespace {

using at::Tensor;

constexpr double NO_CAP = std::numeric_limits<double>::infinity();

// The kernels for these logits on this CPU. torch decides, so ATEN_CPU_CAPABILITY is obeyed as by its own kernels.
const lead::RowKernels& row_kernels(at::ScalarType dtype) {
  static const lead::RowKernels* table = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return lead::AVX512::table;
    if (capability == "AVX2") return lead::AVX2::table;
#endif
    return lead::DEFAULT::table;
  }();
  switch (dtype) {
    case at::kFloat: return table[0];
    case at::kBFloat16: return table[1];
    case at::kHalf: return table[2];
    default: return table[3];
  }
}

void check(const Tensor& logits, const Tensor& targets) {
  const auto dtype = logits.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
                    "logits are ", dtype, ": give float32, bfloat16, float16 or float64");
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0 && (logits.stride(1) == 1 || logits.size(1) == 1),
                    "logits are ", logits.sizes(), " with strides ", logits.strides(), ": give [T, V] with V contiguous");
  TORCH_CHECK_VALUE(targets.dim() == 1 && targets.size(0) == logits.size(0) && targets.scalar_type() == at::kLong &&
                        targets.is_contiguous(),
                    "targets are ", targets.scalar_type(), " ", targets.sizes(), ": give contiguous int64 [T]");
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < targets.size(0); ++i)
    TORCH_CHECK_VALUE(target[i] >= 0 && target[i] < logits.size(1), "target ", target[i],
                      " is outside the vocabulary of ", logits.size(1));
}

// An exact logit for each target, in `wide`, or nothing.
void check_target_logits(const std::optional<Tensor>& given, const Tensor& targets, at::ScalarType wide) {
  if (given)
    TORCH_CHECK_VALUE(given->scalar_type() == wide && given->sizes() == targets.sizes() && given->is_contiguous(),
                      "target_logits are ", given->scalar_type(), " ", given->sizes(), ": give contiguous ", wide, " ",
                      targets.sizes());
}

// f(row index, row) for every row; a thread gets rows worth at least 16 thousand logits.
template <typename F>
void each_row(const Tensor& logits, F f) {
  const int64_t stride_bytes = logits.stride(0) * logits.element_size(), v = logits.size(1);
  const char* base = static_cast<const char*>(logits.const_data_ptr());
  at::parallel_for(0, logits.size(0), 1 + 16384 / v, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, base + i * stride_bytes);
  });
}

// f(a pointer to the element type) for one of the four dtypes.
template <typename F>
void with_type(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kFloat: return f(static_cast<float*>(nullptr));
    case at::kBFloat16: return f(static_cast<at::BFloat16*>(nullptr));
    case at::kHalf: return f(static_cast<at::Half*>(nullptr));
    default: return f(static_cast<double*>(nullptr));
  }
}

// -> [T, 4]: max, log_norm, log-prob of the target, entropy; float32, or float64 for float64. target_logits, of that
// dtype [T], stand for the targets' logits where given.
Tensor row_stats(const Tensor& logits, const Tensor& targets, double temperature, std::optional<double> softcap,
                 const std::optional<Tensor>& target_logits) {
  check(logits, targets);
  const double cap = softcap.value_or(NO_CAP);
  const auto& kernels = row_kernels(logits.scalar_type());
  const auto wide = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  check_target_logits(target_logits, targets, wide);
  Tensor out = at::empty({logits.size(0), 4}, logits.options().dtype(wide));
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const int64_t v = logits.size(1);
  with_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    A* stats = out.mutable_data_ptr<A>();
    const A* exact = target_logits ? target_logits->const_data_ptr<A>() : nullptr;
    each_row(logits, [&](int64_t i, const void* row) {
      const double z = exact ? exact[i] : static_cast<double>(static_cast<const T*>(row)[target[i]]);
      const lead::RowStats s = kernels.stats(row, v, target[i], z, temperature, cap);
      stats[4 * i] = static_cast<A>(s.max);
      stats[4 * i + 1] = static_cast<A>(s.log_norm);
      stats[4 * i + 2] = static_cast<A>(s.logprob);
      stats[4 * i + 3] = static_cast<A>(s.log_norm - s.mean);
    });
  });
  return out;
}

// Writes d loss / d logits = (g (onehot_t - p) - h p (log p + H)) / temperature over the logits, or to `out` where given;
// times 1 - tanh(logit / softcap)^2 where there is a soft cap.
void row_gradient_(const Tensor& logits, const Tensor& targets, const Tensor& stats, const Tensor& grad_logprob,
                   const Tensor& grad_entropy, double temperature, const std::optional<Tensor>& out,
                   std::optional<double> softcap, const std::optional<Tensor>& target_logits) {
  check(logits, targets);
  const double cap = softcap.value_or(NO_CAP);
  const auto& kernels = row_kernels(logits.scalar_type());
  const auto wide = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const Tensor& x : {stats, grad_logprob, grad_entropy})
    TORCH_CHECK_VALUE(x.scalar_type() == wide && x.size(0) == logits.size(0) && x.is_contiguous(),
                      "stats and gradients must be contiguous ", wide, ", a row or a number for each row of logits");
  check_target_logits(target_logits, targets, wide);
  const Tensor& grads = out ? *out : logits;
  TORCH_CHECK_VALUE(grads.sizes() == logits.sizes() && grads.scalar_type() == logits.scalar_type() &&
                        (grads.stride(1) == 1 || grads.size(1) == 1),
                    "out is ", grads.scalar_type(), " ", grads.sizes(), ": give the logits' dtype and shape, V contiguous");
  char* to = static_cast<char*>(grads.mutable_data_ptr());
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const int64_t v = logits.size(1), step_bytes = grads.stride(0) * grads.element_size();
  with_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const A *all = stats.const_data_ptr<A>(), *g = grad_logprob.const_data_ptr<A>(),
            *h = grad_entropy.const_data_ptr<A>(), *exact = target_logits ? target_logits->const_data_ptr<A>() : nullptr;
    each_row(logits, [&](int64_t i, const void* row) {
      void* grad = to + i * step_bytes;
      const A* s = all + 4 * i;
      const double max = s[0], log_norm = s[1], logprob = s[2], entropy = s[3], gi = g[i], hi = h[i];
      // Read before the row is written over. The cap's derivative is 1 / cosh(z / cap)^2.
      const double z = exact ? exact[i] : static_cast<double>(static_cast<const T*>(row)[target[i]]);
      const double slope = cap < NO_CAP ? std::pow(std::cosh(z / cap), -2) : 1;
      kernels.gradient(row, grad, v, temperature, cap, max, log_norm, (-gi - hi * (entropy - log_norm)) / temperature,
                       -hi / temperature);
      const double p = std::exp(logprob);
      const double at_target = -gi * std::expm1(logprob) - (hi == 0 || p == 0 ? 0 : hi * p * (logprob + entropy));
      static_cast<T*>(grad)[target[i]] = static_cast<T>(static_cast<A>(at_target / temperature * slope));
    });
  });
}

// -> reward [S], advantage [S], solve_rate [P] in float32, kept [P] bool, weight [P] in float32.
// outcomes: float32 or float64 [S, 4], correct, length, reward if wrong, bonus; options: AdvantageOptions.encode.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lead_advantages(const Tensor& outcomes, int64_t group_size,
                                                                   at::ArrayRef<double> options) {
  TORCH_CHECK_VALUE(outcomes.dim() == 2 && outcomes.size(1) == 4, "outcomes are ", outcomes.sizes(), ": give [S, 4]");
  const int64_t n = outcomes.size(0);
  TORCH_CHECK_VALUE(group_size > 0 && n % group_size == 0, "there are outcomes of ", n,
                    " responses: give a multiple of the group size ", group_size);
  TORCH_CHECK_VALUE(options.size() == lead::AdvantageOptions::SIZE, "there are ", options.size(),
                    " options: give what AdvantageOptions.encode returns, ", lead::AdvantageOptions::SIZE);
  const auto decoded = lead::AdvantageOptions::decode(options.data());
  const Tensor columns = outcomes.t().to(at::kDouble).contiguous();  // [4, S]
  const double *correct = columns.const_data_ptr<double>(), *lengths = correct + n, *wrong = lengths + n, *bonus = wrong + n;
  const auto floats = outcomes.options().dtype(at::kFloat);
  Tensor reward = at::empty({n}, floats), advantage = at::empty({n}, floats);
  Tensor rate = at::empty({n / group_size}, floats), kept = at::empty({n / group_size}, floats.dtype(at::kBool));
  Tensor weight = at::empty({n / group_size}, floats);
  float *reward_p = reward.mutable_data_ptr<float>(), *advantage_p = advantage.mutable_data_ptr<float>(),
        *rate_p = rate.mutable_data_ptr<float>(), *weight_p = weight.mutable_data_ptr<float>();
  bool* kept_p = kept.mutable_data_ptr<bool>();
  at::parallel_for(0, n / group_size, 1 + 4096 / group_size, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t i = p * group_size;
      const auto result = lead::lead_group(decoded, group_size, correct + i, lengths + i, wrong + i, bonus + i,
                                           reward_p + i, advantage_p + i);
      rate_p[p] = static_cast<float>(result.solve_rate);
      kept_p[p] = result.kept;
      weight_p[p] = static_cast<float>(result.weight);
    }
  });
  return {reward, advantage, rate, kept, weight};
}

}  // namespace

TORCH_LIBRARY(lead_kernels_cpu, m) {
  m.def("row_stats(Tensor logits, Tensor targets, float temperature, float? softcap=None, "
      "Tensor? target_logits=None) -> Tensor");
  m.def(
      "row_gradient_(Tensor(a!) logits, Tensor targets, Tensor stats, Tensor grad_logprob, Tensor grad_entropy, "
      "float temperature, Tensor(b!)? out=None, float? softcap=None, Tensor? target_logits=None) -> ()");
  m.def(
      "lead_advantages(Tensor outcomes, int group_size, float[] options) -> (Tensor reward, Tensor advantage, "
      "Tensor solve_rate, Tensor kept, Tensor weight)");
}

TORCH_LIBRARY_IMPL(lead_kernels_cpu, CPU, m) {
  m.impl("row_stats", row_stats);
  m.impl("row_gradient_", row_gradient_);
  m.impl("lead_advantages", lead_advantages);
}

// Importing the module registers the operators; it holds nothing else.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "CPU operators of lead_kernels", -1, nullptr};
  return PyModule_Create(&module);
}
