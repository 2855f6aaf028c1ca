// The sparse backward of a row of logits: which columns its gradient needs, and products with gathered rows. See
// sparse.cpp; kernels/lead_kernels/_sparse.py holds the specification.
#pragma once
#include <cstdint>

namespace lead {

// Statistics of a row, and what to leave out of it. With y = softcap tanh(z / softcap), or the logit z itself if
// softcap is infinity: p = exp((y - max) / temperature - log_norm).
struct SparseRow {
  double max, log_norm, logprob;  // logprob: of the target
  double g;                       // d loss / d logprob
  double temperature, softcap;
  int64_t target;
  double mass;        // largest sum of the entries that are left out
  bool sample;        // keep some of them at random, at the threshold's value
  std::uint32_t key;  // of that draw: a hash of seed and row
};

// Buffers for one row, of v + ROOM numbers each.
struct SparseRoom {
  static constexpr int64_t ROOM = 64;
  int32_t* candidates;
  float* masses;
  int32_t* columns;  // the result, in ascending order
  float* values;     // d loss / d logits at `columns`
};

struct SparseEntries {
  int64_t n;         // entries kept; if above `most`, nothing else is filled in
  double dropped;    // sum of p over the entries below the threshold, without the target
  double drawn;      // the threshold, summed over those of them that the draw keeps
  double threshold;  // on p
};

struct SparseKernels {
  SparseEntries (*select)(const SparseRow& row, const void* logits, int64_t v, int64_t most, const SparseRoom& room);
  // Writes out[k] = sum over e of values[e] rows[index[e]][k] for k < d, in float and in the order of e, rounded once;
  // `out` has the rows' type.
  void (*product)(const int32_t* index, const float* values, int64_t n, const void* rows, int64_t stride, int64_t d,
                  void* out);
  // Adds the same to `out`.
  void (*add_product)(const int32_t* index, const float* values, int64_t n, const void* rows, int64_t stride, int64_t d,
                      float* out);
  // Returns the sum of the squares of d numbers.
  double (*square)(const void* row, int64_t d);
};

// One entry per dtype (float, bfloat16, half), for each instruction set that sparse.cpp is compiled for.
namespace DEFAULT {
extern const SparseKernels sparse_table[3];
}
namespace AVX2 {
extern const SparseKernels sparse_table[3];
}
namespace AVX512 {
extern const SparseKernels sparse_table[3];
}

// Hashes 32 bits (C. Wellons' lowbias32).
inline std::uint32_t mix(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

}  // namespace lead
