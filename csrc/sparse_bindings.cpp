// The operators of the sparse backward on CPU tensors, which distribute rows over torch's threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "sparse.h"

namespace {

using at::Tensor;

const lead::SparseKernels& sparse_kernels(at::ScalarType dtype) {
  static const lead::SparseKernels* table = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return lead::AVX512::sparse_table;
    if (capability == "AVX2") return lead::AVX2::sparse_table;
#endif
    return lead::DEFAULT::sparse_table;
  }();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "rows are ", dtype,
                    ": give float32, bfloat16 or float16");
  return table[dtype == at::kFloat ? 0 : dtype == at::kBFloat16 ? 1 : 2];
}

void check_matrix(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1), name, " is ", x.sizes(), " with strides ",
                    x.strides(), ": give a matrix whose rows are contiguous");
}

void check_vector(const char* name, const Tensor& x, at::ScalarType dtype, int64_t n) {
  TORCH_CHECK_VALUE(x.is_contiguous() && x.scalar_type() == dtype && x.numel() == n, name, " is ", x.scalar_type(), " ",
                    x.sizes(), ": give contiguous ", dtype, " with ", n, " numbers");
}

// Returns starts [C + 1] int64, columns [N] int32, values [N] float32, dropped [C], drawn [C] and threshold [C]
// float32. A row that needs more than `most` columns gets no columns and a threshold of -1.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_rows(const Tensor& logits, const Tensor& targets,
                                                               const Tensor& stats, const Tensor& grad_logprob,
                                                               double temperature, std::optional<double> softcap,
                                                               double mass, int64_t most, bool sample, int64_t seed,
                                                               int64_t first_row) {
  check_matrix("logits", logits);
  const int64_t rows = logits.size(0), v = logits.size(1);
  const auto& kernels = sparse_kernels(logits.scalar_type());
  check_vector("targets", targets, at::kLong, rows);
  check_vector("stats", stats, at::kFloat, 4 * rows);
  check_vector("grad_logprob", grad_logprob, at::kFloat, rows);
  TORCH_CHECK_VALUE(v <= std::numeric_limits<int32_t>::max() && mass > 0 && most >= 1 && most <= v,
                    "there are ", v, " columns, mass is ", mass, " and most ", most,
                    ": give mass above 0 and most in 1 to V");
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    TORCH_CHECK_VALUE(target[i] >= 0 && target[i] < v, "target ", target[i], " is outside the vocabulary of ", v);
  const float *all = stats.const_data_ptr<float>(), *g = grad_logprob.const_data_ptr<float>();
  const char* base = static_cast<const char*>(logits.const_data_ptr());
  const int64_t stride_bytes = logits.stride(0) * logits.element_size();
  const double cap = softcap.value_or(std::numeric_limits<double>::infinity());

  Tensor starts = at::empty({rows + 1}, targets.options()), dropped = at::empty({rows}, stats.options()),
         drawn = at::empty({rows}, stats.options()), threshold = at::empty({rows}, stats.options());
  float *dropped_p = dropped.mutable_data_ptr<float>(), *drawn_p = drawn.mutable_data_ptr<float>(), *threshold_p = threshold.mutable_data_ptr<float>();
  std::vector<std::vector<int32_t>> columns(rows);
  std::vector<std::vector<float>> values(rows);
  at::parallel_for(0, rows, 1 + 16384 / v, [&](int64_t begin, int64_t end) {
    const int64_t size = v + lead::SparseRoom::ROOM;
    const std::unique_ptr<int32_t[]> ints(new int32_t[2 * size]);
    const std::unique_ptr<float[]> floats(new float[2 * size]);
    const lead::SparseRoom room{ints.get(), floats.get(), ints.get() + size, floats.get() + size};
    for (int64_t i = begin; i < end; ++i) {
      const float* s = all + 4 * i;
      const std::uint32_t key = lead::mix(static_cast<std::uint32_t>(first_row + i) ^ lead::mix(static_cast<std::uint32_t>(seed)));
      const lead::SparseRow row{s[0], s[1], s[2], g[i], temperature, cap, target[i], mass, sample, key};
      const auto found = kernels.select(row, base + i * stride_bytes, v, most, room);
      const bool fits = found.n <= most;
      dropped_p[i] = fits ? static_cast<float>(found.dropped) : 0.0f;
      drawn_p[i] = fits ? static_cast<float>(found.drawn) : 0.0f;
      threshold_p[i] = fits ? static_cast<float>(found.threshold) : -1.0f;
      if (fits) {
        columns[i].assign(room.columns, room.columns + found.n);
        values[i].assign(room.values, room.values + found.n);
      }
    }
  });
  int64_t* start = starts.mutable_data_ptr<int64_t>();
  start[0] = 0;
  for (int64_t i = 0; i < rows; ++i) start[i + 1] = start[i] + static_cast<int64_t>(columns[i].size());
  Tensor all_columns = at::empty({start[rows]}, targets.options().dtype(at::kInt)), all_values = at::empty({start[rows]}, stats.options());
  for (int64_t i = 0; i < rows; ++i) {
    std::copy(columns[i].begin(), columns[i].end(), all_columns.mutable_data_ptr<int32_t>() + start[i]);
    std::copy(values[i].begin(), values[i].end(), all_values.mutable_data_ptr<float>() + start[i]);
  }
  return {starts, all_columns, all_values, dropped, drawn, threshold};
}

void check_entries(const Tensor& starts, const Tensor& columns, const Tensor& values, int64_t rows, int64_t width) {
  check_vector("starts", starts, at::kLong, rows + 1);
  const int64_t* start = starts.const_data_ptr<int64_t>();
  check_vector("columns", columns, at::kInt, start[rows]);
  check_vector("values", values, at::kFloat, start[rows]);
  const int32_t* column = columns.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t e = start[i]; e < start[i + 1]; ++e)
      TORCH_CHECK_VALUE(column[e] >= (e > start[i] ? column[e - 1] + 1 : 0) && column[e] < width, "row ", i,
                        " has the column ", column[e], ": give columns below ", width, " in ascending order");
}

// Writes the sparse matrix [C, V] times weight [V, D] to out [C, D]; rows without entries get zeros.
void sparse_product_(const Tensor& out, const Tensor& starts, const Tensor& columns, const Tensor& values,
                     const Tensor& weight) {
  check_matrix("out", out);
  check_matrix("weight", weight);
  const int64_t rows = out.size(0), d = out.size(1);
  check_entries(starts, columns, values, rows, weight.size(0));
  TORCH_CHECK_VALUE(weight.size(1) == d && weight.scalar_type() == out.scalar_type(), "weight is ", weight.scalar_type(),
                    " ", weight.sizes(), " and out ", out.scalar_type(), " ", out.sizes(), ": give one dtype and width");
  const auto& kernels = sparse_kernels(weight.scalar_type());
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int32_t* column = columns.const_data_ptr<int32_t>();
  const float* value = values.const_data_ptr<float>();
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t step_bytes = out.stride(0) * out.element_size();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.product(column + start[i], value + start[i], start[i + 1] - start[i], weight.const_data_ptr(), weight.stride(0),
                      d, to + i * step_bytes);
  });
}

// Adds the transposed sparse matrix [V, C] times hidden [C, D] to total [V, D], and its column sums to bias [V] if
// given.
void sparse_outer_(const Tensor& total, const Tensor& starts, const Tensor& columns, const Tensor& values,
                   const Tensor& hidden, const std::optional<Tensor>& bias) {
  check_matrix("total", total);
  check_matrix("hidden", hidden);
  const int64_t rows = hidden.size(0), d = hidden.size(1), v = total.size(0);
  check_entries(starts, columns, values, rows, v);
  TORCH_CHECK_VALUE(total.size(1) == d && total.scalar_type() == at::kFloat, "total is ", total.scalar_type(), " ",
                    total.sizes(), ": give float32 [V, D] of the hidden states' D, ", d);
  if (bias) check_vector("bias", *bias, at::kFloat, v);
  const auto& kernels = sparse_kernels(hidden.scalar_type());
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int32_t* column = columns.const_data_ptr<int32_t>();
  const float* value = values.const_data_ptr<float>();
  // Sort entries by column, and within a column by row: count, then place.
  const int64_t n = start[rows];
  std::vector<int64_t> first(v + 1, 0);
  for (int64_t e = 0; e < n; ++e) ++first[column[e] + 1];
  for (int64_t j = 0; j < v; ++j) first[j + 1] += first[j];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  std::vector<int32_t> row(n);
  std::vector<float> sorted(n);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t e = start[i]; e < start[i + 1]; ++e) {
      const int64_t at = next[column[e]]++;
      row[at] = static_cast<int32_t>(i);
      sorted[at] = value[e];
    }
  float *to = total.mutable_data_ptr<float>(), *to_bias = bias ? bias->mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, v, 512, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t count = first[j + 1] - first[j];
      if (!count) continue;
      kernels.add_product(row.data() + first[j], sorted.data() + first[j], count, hidden.const_data_ptr(), hidden.stride(0),
                          d, to + j * total.stride(0));
      if (to_bias) {
        float sum = 0;
        for (int64_t e = first[j]; e < first[j + 1]; ++e) sum += sorted[e];
        to_bias[j] += sum;
      }
    }
  });
}

// Returns the largest Euclidean norm of a row.
double max_row_norm(const Tensor& weight) {
  check_matrix("weight", weight);
  const auto& kernels = sparse_kernels(weight.scalar_type());
  const char* base = static_cast<const char*>(weight.const_data_ptr());
  const int64_t stride_bytes = weight.stride(0) * weight.element_size(), d = weight.size(1);
  const double most = at::parallel_reduce(
      0, weight.size(0), 512, 0.0,
      [&](int64_t begin, int64_t end, double most) {
        for (int64_t j = begin; j < end; ++j) most = std::max(most, kernels.square(base + j * stride_bytes, d));
        return most;
      },
      [](double a, double b) { return std::max(a, b); });
  return std::sqrt(most);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lead_kernels_cpu, m) {
  m.def(
      "sparse_rows(Tensor logits, Tensor targets, Tensor stats, Tensor grad_logprob, float temperature, float? softcap, "
      "float mass, int most, bool sample=False, int seed=0, int first_row=0) -> (Tensor starts, Tensor columns, "
      "Tensor values, Tensor dropped, Tensor drawn, Tensor threshold)");
  m.def("sparse_product_(Tensor(a!) out, Tensor starts, Tensor columns, Tensor values, Tensor weight) -> ()");
  m.def(
      "sparse_outer_(Tensor(a!) total, Tensor starts, Tensor columns, Tensor values, Tensor hidden, "
      "Tensor(b!)? bias=None) -> ()");
  m.def("max_row_norm(Tensor weight) -> float");
}

TORCH_LIBRARY_IMPL(lead_kernels_cpu, CPU, m) {
  m.impl("sparse_rows", sparse_rows);
  m.impl("sparse_product_", sparse_product_);
  m.impl("sparse_outer_", sparse_outer_);
  m.impl("max_row_norm", max_row_norm);
}
