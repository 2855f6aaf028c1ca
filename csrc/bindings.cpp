// Registration with torch and Python: operators on CPU tensors, which distribute rows over torch's threads.
#include <Python.h>

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <tuple>

#include "rows.h"

namespace {

using at::Tensor;

constexpr double NO_CAP = std::numeric_limits<double>::infinity();

// The kernels for these logits on this CPU. torch decides, so ATEN_CPU_CAPABILITY applies as it does to torch's
// kernels.
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

// One exact logit per target, of dtype `wide`; null if not given.
void check_target_logits(const std::optional<Tensor>& given, const Tensor& targets, at::ScalarType wide) {
  if (given)
    TORCH_CHECK_VALUE(given->scalar_type() == wide && given->sizes() == targets.sizes() && given->is_contiguous(),
                      "target_logits are ", given->scalar_type(), " ", given->sizes(), ": give contiguous ", wide, " ",
                      targets.sizes());
}

// Buffer for the exponentials of a row, aligned for vectors.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : memory_(bytes ? ::operator new(bytes, std::align_val_t(64)) : nullptr) {}
  ~Buffer() { ::operator delete(memory_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

// Calls f(row index, row, next row or null, buffer of `bytes`) for every row. A thread gets rows with at least 16
// thousand logits in all, and one buffer.
template <typename F>
void each_row(const Tensor& logits, F f, size_t bytes = 0) {
  const int64_t stride_bytes = logits.stride(0) * logits.element_size(), v = logits.size(1);
  const char* base = static_cast<const char*>(logits.const_data_ptr());
  at::parallel_for(0, logits.size(0), 1 + 16384 / v, [&](int64_t begin, int64_t end) {
    const Buffer buffer(bytes);
    for (int64_t i = begin; i < end; ++i) {
      const char* row = base + i * stride_bytes;
      f(i, row, i + 1 < end ? row + stride_bytes : nullptr, buffer.get());
    }
  });
}

// Calls f with a pointer to the element type, one of four.
template <typename F>
void with_type(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kFloat: return f(static_cast<float*>(nullptr));
    case at::kBFloat16: return f(static_cast<at::BFloat16*>(nullptr));
    case at::kHalf: return f(static_cast<at::Half*>(nullptr));
    default: return f(static_cast<double*>(nullptr));
  }
}

double entropy(const lead::RowStats& s) {
  const double h = s.log_norm - s.mean;
  return h < 0 ? 0 : h;  // rounding may make it negative; NaN is kept
}

void check_out(const Tensor& out, const Tensor& logits) {
  TORCH_CHECK_VALUE(out.sizes() == logits.sizes() && out.scalar_type() == logits.scalar_type() &&
                        (out.stride(1) == 1 || out.size(1) == 1),
                    "out is ", out.scalar_type(), " ", out.sizes(), ": give the logits' dtype and shape, V contiguous");
}

// Writes (g (onehot - p) - h p (log p + H)) / temperature to `out`, which may be `row`; z: the target's logit, read
// before the row is overwritten. The derivative of a soft cap is 1 / cosh(z / cap)^2.
template <typename T>
void write_gradient(const lead::RowKernels& kernels, const void* row, void* out, int64_t v, int64_t target, double z,
                    double temperature, double cap, double max, double log_norm, double logprob, double entropy,
                    double g, double h, const void* exps) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  kernels.gradient(row, out, v, temperature, cap, max, log_norm, (-g - h * (entropy - log_norm)) / temperature,
                   -h / temperature, exps);
  const double p = std::exp(logprob), slope = cap < NO_CAP ? std::pow(std::cosh(z / cap), -2) : 1;
  const double at_target = -g * std::expm1(logprob) - (h == 0 || p == 0 ? 0 : h * p * (logprob + entropy));
  static_cast<T*>(out)[target] = static_cast<T>(static_cast<A>(at_target / temperature * slope));
}

// Returns max, log_norm, log-prob of the target and entropy, [T, 4] in float32 (float64 for float64). target_logits,
// [T] in that dtype, replace the targets' logits if given.
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
    each_row(logits, [&](int64_t i, const void* row, const void* next, void*) {
      const double z = exact ? exact[i] : static_cast<double>(static_cast<const T*>(row)[target[i]]);
      const lead::RowStats s = kernels.stats(row, v, target[i], z, temperature, cap, nullptr, next);
      stats[4 * i] = static_cast<A>(s.max);
      stats[4 * i + 1] = static_cast<A>(s.log_norm);
      stats[4 * i + 2] = static_cast<A>(s.logprob);
      stats[4 * i + 3] = static_cast<A>(entropy(s));
    });
  });
  return out;
}

// Writes d loss / d logits = (g (onehot_t - p) - h p (log p + H)) / temperature over the logits, or to `out` if given;
// with a soft cap, times 1 - tanh(logit / softcap)^2.
void row_gradient_(const Tensor& logits, const Tensor& targets, const Tensor& stats, const Tensor& grad_logprob,
                   const Tensor& grad_entropy, double temperature, const std::optional<Tensor>& out,
                   std::optional<double> softcap, const std::optional<Tensor>& target_logits) {
  check(logits, targets);
  const double cap = softcap.value_or(NO_CAP);
  const auto& kernels = row_kernels(logits.scalar_type());
  const auto wide = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const Tensor& x : {stats, grad_logprob, grad_entropy})
    TORCH_CHECK_VALUE(x.scalar_type() == wide && x.size(0) == logits.size(0) && x.is_contiguous(),
                      "stats and gradients must be contiguous ", wide, ", with one entry for each row of logits");
  check_target_logits(target_logits, targets, wide);
  const Tensor& grads = out ? *out : logits;
  check_out(grads, logits);
  char* to = static_cast<char*>(grads.mutable_data_ptr());
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const int64_t v = logits.size(1), step_bytes = grads.stride(0) * grads.element_size();
  with_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const A *all = stats.const_data_ptr<A>(), *g = grad_logprob.const_data_ptr<A>(),
            *h = grad_entropy.const_data_ptr<A>(), *exact = target_logits ? target_logits->const_data_ptr<A>() : nullptr;
    each_row(logits, [&](int64_t i, const void* row, const void*, void*) {
      const A* s = all + 4 * i;
      const double z = exact ? exact[i] : static_cast<double>(static_cast<const T*>(row)[target[i]]);
      write_gradient<T>(kernels, row, to + i * step_bytes, v, target[i], z, temperature, cap, s[0], s[1], s[2], s[3],
                        g[i], h[i], nullptr);
    });
  });
}

// One number per row or per sequence, in the results' precision; may be absent.
template <typename A>
class Column {
 public:
  Column(const std::optional<Tensor>& given, const char* name, int64_t rows) {
    if (!given) return;
    TORCH_CHECK_VALUE(given->dim() == 1 && given->size(0) == rows, name, " is ", given->sizes(), ": give [", rows, "]");
    held_ = given->to(c10::CppTypeToScalarType<A>::value).contiguous();
    data_ = held_.const_data_ptr<A>();
  }
  // Copies the i-th number to `room` and returns its address, or null if the column is absent.
  const double* at(int64_t i, double& room) const {
    if (!data_) return nullptr;
    room = data_[i];
    return &room;
  }
  A operator[](int64_t i) const { return data_[i]; }

 private:
  Tensor held_;
  const A* data_ = nullptr;
};

// Computes loss and gradient from logits, each row in one go while it is in the cache.
//
// tokens: targets, sequence_ids, behavior, old, reference, and terms: log_ratio, importance, in the order of Tokens and
// SequenceTerms (records.py); weights, advantages: one per sequence; options: LossOptions.encode, which ends in
// temperature and soft cap; clip_range: LossOptions.clip_range; out: receives the gradient, and may be the logits or
// absent. Returns loss [T], log-prob [T], entropy [T], metrics [8, T] in float32 (float64 for float64).
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_rows_(
    const Tensor& logits, const c10::List<std::optional<Tensor>>& tokens, const c10::List<std::optional<Tensor>>& terms,
    const Tensor& weights, const Tensor& advantages, at::ArrayRef<double> options, at::ArrayRef<double> clip_range,
    const std::optional<Tensor>& out, const std::optional<Tensor>& target_logits) {
  TORCH_CHECK_VALUE(tokens.size() == 5 && tokens.get(0) && tokens.get(1) && terms.size() == 2,
                    "there are ", tokens.size(), " tensors of tokens and ", terms.size(), " terms: give 5 and 2");
  TORCH_CHECK_VALUE(options.size() >= lead::LossOptions::SIZE + 2 && clip_range.size() == 2, "there are ",
                    options.size(), " options and ", clip_range.size(),
                    " bounds: give what LossOptions.encode and clip_range return");
  const Tensor targets = tokens.get(0)->contiguous(), ids = tokens.get(1)->to(at::kLong).contiguous();
  check(logits, targets);
  const int64_t rows = logits.size(0), v = logits.size(1), sequences = weights.size(0);
  TORCH_CHECK_VALUE(ids.sizes() == targets.sizes() && weights.dim() == 1 && advantages.sizes() == weights.sizes(),
                    "sequence ids are ", ids.sizes(), ", weights ", weights.sizes(), " and advantages ",
                    advantages.sizes(), ": give [T], [S] and [S]");
  const int64_t* sequence = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    TORCH_CHECK_VALUE(sequence[i] >= 0 && sequence[i] < sequences, "sequence id ", sequence[i],
                      " is outside the number of sequences, ", sequences);
  const auto o = lead::LossOptions::decode(options.data(), clip_range[0], clip_range[1]);
  const double temperature = options[options.size() - 2], cap = options[options.size() - 1];
  const auto& kernels = row_kernels(logits.scalar_type());
  const auto wide = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  check_target_logits(target_logits, targets, wide);
  if (out) check_out(*out, logits);
  const auto floats = logits.options().dtype(wide);
  Tensor loss = at::empty({rows}, floats), logprob = at::empty({rows}, floats), entropies = at::empty({rows}, floats),
         metrics = at::empty({lead::RowLoss::METRICS, rows}, floats);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  char* to = out ? static_cast<char*>(out->mutable_data_ptr()) : nullptr;
  const int64_t step_bytes = out ? out->stride(0) * out->element_size() : 0;
  with_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Column<A> weight(weights, "weights", sequences), advantage(advantages, "advantages", sequences),
        behavior(tokens.get(2), "behavior", rows), old(tokens.get(3), "old", rows),
        reference(tokens.get(4), "reference", rows), log_ratio(terms.get(0), "log_ratio", rows),
        importance(terms.get(1), "importance", rows);
    const A* exact = target_logits ? target_logits->const_data_ptr<A>() : nullptr;
    A *loss_p = loss.mutable_data_ptr<A>(), *logprob_p = logprob.mutable_data_ptr<A>(),
      *entropy_p = entropies.mutable_data_ptr<A>(), *metrics_p = metrics.mutable_data_ptr<A>();
    each_row(
        logits,
        [&](int64_t i, const void* row, const void* next, void* exps) {
          const double z = exact ? exact[i] : static_cast<double>(static_cast<const T*>(row)[target[i]]);
          const lead::RowStats s = kernels.stats(row, v, target[i], z, temperature, cap, exps, next);
          // Rounded before use, so that the ratio to a log-prob returned earlier is exactly 1.
          logprob_p[i] = static_cast<A>(s.logprob);
          entropy_p[i] = static_cast<A>(entropy(s));
          double room[5];
          const lead::RowLoss l = lead::row_loss(
              o, {logprob_p[i], entropy_p[i], advantage[sequence[i]], weight[sequence[i]], behavior.at(i, room[0]),
                  old.at(i, room[1]), reference.at(i, room[2]), log_ratio.at(i, room[3]), importance.at(i, room[4])});
          loss_p[i] = static_cast<A>(l.loss);
          for (int k = 0; k < lead::RowLoss::METRICS; ++k) metrics_p[k * rows + i] = static_cast<A>(l.metrics[k]);
          if (to)
            write_gradient<T>(kernels, row, to + i * step_bytes, v, target[i], z, temperature, cap, s.max, s.log_norm,
                              s.logprob, entropy(s), l.grad_logprob, l.grad_entropy, exps);
        },
        to ? (v + lead::ROOM) * sizeof(A) : 0);
  });
  return {loss, logprob, entropies, metrics};
}

// Returns reward [S], advantage [S], solve_rate [P] in float32, kept [P] bool, weight [P] in float32.
// outcomes: correct, length, reward if wrong, bonus, float32 or float64 [S, 4]; options: AdvantageOptions.encode.
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
      "policy_rows_(Tensor(a!) logits, Tensor?[] tokens, Tensor?[] terms, Tensor weights, Tensor advantages, "
      "float[] options, float[] clip_range, Tensor(b!)? out=None, Tensor? target_logits=None) -> (Tensor loss, Tensor logprob, "
      "Tensor entropy, Tensor metrics)");
  m.def(
      "lead_advantages(Tensor outcomes, int group_size, float[] options) -> (Tensor reward, Tensor advantage, "
      "Tensor solve_rate, Tensor kept, Tensor weight)");
}

TORCH_LIBRARY_IMPL(lead_kernels_cpu, CPU, m) {
  m.impl("row_stats", row_stats);
  m.impl("row_gradient_", row_gradient_);
  m.impl("policy_rows_", policy_rows_);
  m.impl("lead_advantages", lead_advantages);
}

// Importing the module registers the operators; it contains nothing else.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "CPU operators of lead_kernels", -1, nullptr};
  return PyModule_Create(&module);
}
