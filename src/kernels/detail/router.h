#pragma once

// What the host's and the device's body of the router share: the cut into chunks, the scratch, the
// coefficients of the balance loss.

#include <cstdint>

#include "kernels/routing.h"

#ifdef __CUDACC__
#define DSV3_HOST_DEVICE __host__ __device__
#else
#define DSV3_HOST_DEVICE
#endif

namespace dsv3::kernels::detail {

/// How the tokens are cut: chunks lie within one sequence, chunk c of sequence b has number
/// b · per_sequence + c. Depends on the shape only, so that sums do not depend on the machine.
struct RouterChunks {
  int64_t sequence_length;  // S
  int32_t tokens;           // of a chunk
  int32_t per_sequence;
  int64_t count;
};

/// 128 tokens fill an H100's 132 multiprocessors from 16,384 tokens on; fewer tokens, smaller
/// chunks.
inline RouterChunks router_chunks(int64_t num_tokens, int64_t num_sequences) {
  const int64_t length = num_tokens / num_sequences;
  const int32_t tokens = num_tokens <= 4096 ? 32 : num_tokens <= 8192 ? 64 : 128;
  const auto per_sequence = static_cast<int32_t>((length + tokens - 1) / tokens);
  return {length, tokens, per_sequence, num_sequences * per_sequence};
}

struct RouterPartials {
  float* sums;      // [chunks, E] Σ s / Σs of the valid tokens
  int32_t* raw;     // [chunks, E] raw top-K choices of the valid tokens
  int32_t* chosen;  // [chunks, E] choices
  int32_t* valid;   // [chunks] valid tokens
  float* losses;    // [B]
  int32_t* ticket;  // [1] sequences that are done
};

inline RouterPartials router_partials(const RouteForward& p, const RouterChunks& chunks) {
  const int64_t items = chunks.count * p.shape.num_experts;
  auto* sums = static_cast<float*>(p.workspace);
  auto* raw = reinterpret_cast<int32_t*>(sums + items);
  auto* chosen = raw + items;
  auto* valid = chosen + items;
  auto* losses = reinterpret_cast<float*>(valid + chunks.count);
  return {sums, raw, chosen, valid, losses, reinterpret_cast<int32_t*>(losses + p.num_sequences)};
}

/// f_i / n of the report: E / (K n²) · count.
DSV3_HOST_DEVICE inline float balance_coefficient(int32_t num_experts, int32_t num_choices,
                                                  int64_t count, int64_t num_valid) {
  if (num_valid == 0) return 0.0f;
  const double n = static_cast<double>(num_valid);
  return static_cast<float>(static_cast<double>(num_experts) * static_cast<double>(count) /
                            (num_choices * n * n));
}

/// Throws std::invalid_argument naming the number that is out of range.
void check_route(const RouteForward& p);

}  // namespace dsv3::kernels::detail
