#pragma once

// What the host's and the device's body of the sequence balance loss share: the cut into chunks and
// the scratch.

#include <cstdint>

#include "kernels/routing.h"

#ifdef __CUDACC__
#define DSV3_HOST_DEVICE __host__ __device__
#else
#define DSV3_HOST_DEVICE
#endif

namespace dsv3::kernels::detail {

/// Tokens of one sequence that are summed together; fixed, so that sums do not depend on the
/// machine.
inline constexpr int64_t kBalanceChunk = 128;

inline int balance_chunks(int64_t sequence_length) {
  return static_cast<int>((sequence_length + kBalanceChunk - 1) / kBalanceChunk);
}

struct BalancePartials {
  float* sums;      // [B, chunks, E] Σ s / Σs
  int32_t* counts;  // [B, chunks, E] raw top-K choices
  int32_t* valid;   // [B, chunks] valid tokens
};

inline BalancePartials balance_partials(const SequenceBalanceForward& p) {
  const int64_t items = p.num_sequences * balance_chunks(p.sequence_length) * p.num_experts;
  auto* sums = static_cast<float*>(p.workspace);
  auto* counts = reinterpret_cast<int32_t*>(sums + items);
  return {sums, counts, counts + items};
}

/// f_i / n of the report: E / (K n²) · count.
DSV3_HOST_DEVICE inline float balance_coefficient(int32_t num_experts, int32_t num_choices,
                                                  int64_t count, int64_t num_valid) {
  if (num_valid == 0) return 0.0f;
  const double n = static_cast<double>(num_valid);
  return static_cast<float>(static_cast<double>(num_experts) * static_cast<double>(count) /
                            (num_choices * n * n));
}

/// Throws std::invalid_argument when experts or choices are out of range.
void check_balance_shape(const SequenceBalanceForward& p);

}  // namespace dsv3::kernels::detail
