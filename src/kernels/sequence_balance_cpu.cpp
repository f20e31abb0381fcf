// Sequence-wise balance loss on the host: chunks of a sequence are shared between threads, then
// joined in order. Technical report §2.1.2, eq. 17–20.

#include "kernels/detail/sequence_balance.h"

#include "kernels/detail/cpu.h"
#include "kernels/detail/lanes.h"
#include "kernels/detail/top_k.h"
#include "kernels/routing.h"

namespace dsv3::kernels {

int64_t sequence_balance_workspace(int64_t num_sequences, int64_t sequence_length,
                                   int32_t num_experts) {
  const int64_t chunks = num_sequences * detail::balance_chunks(sequence_length);
  return chunks * (2 * int64_t{num_experts} + 1) * int64_t{sizeof(float)};
}

namespace detail {

void check_balance_shape(const SequenceBalanceForward& p) {
  require(p.num_experts >= 1 && p.num_experts <= kMaxExperts,
          "[sequence_balance_loss] num_experts: expected 1 to {}, got {}", kMaxExperts,
          p.num_experts);
  const int32_t most = std::min(kMaxChoices, p.num_experts);
  require(p.num_experts_per_token >= 1 && p.num_experts_per_token <= most,
          "[sequence_balance_loss] num_experts_per_token: expected 1 to {}, got {}", most,
          p.num_experts_per_token);
}

}  // namespace detail

namespace cpu {
namespace {

using namespace detail;
using kernels::detail::BalancePartials;
using kernels::detail::kBalanceChunk;

DSV3_CLONES void sum_chunk(const SequenceBalanceForward& p, const BalancePartials& partials,
                           int64_t num_chunks, int64_t index) {
  const int64_t num_experts = p.num_experts;
  const int64_t sequence = index / num_chunks, chunk = index % num_chunks;
  float sums[kMaxExperts] = {};
  int32_t counts[kMaxExperts] = {};
  int32_t num_valid = 0;
  int32_t ids[kMaxChoices];
  float top[kMaxChoices];
  const int64_t end = std::min(p.sequence_length, (chunk + 1) * kBalanceChunk);
  for (int64_t t = chunk * kBalanceChunk; t < end; ++t) {
    const int64_t token = sequence * p.sequence_length + t;
    if (p.valid != nullptr && !p.valid[token]) continue;
    ++num_valid;
    const float* const s = p.scores + token * num_experts;
    const float inverse = 1.0f / (sum_row(s, num_experts) + 1e-20f);
    for (int64_t e = 0; e < num_experts; ++e) sums[e] += s[e] * inverse;
    select_top(s, p.num_experts, p.num_experts_per_token, ids, top);
    for (int32_t k = 0; k < p.num_experts_per_token; ++k) ++counts[ids[k]];
  }
  std::copy_n(sums, num_experts, partials.sums + index * num_experts);
  std::copy_n(counts, num_experts, partials.counts + index * num_experts);
  partials.valid[index] = num_valid;
}

DSV3_CLONES void backward_rows(const SequenceBalanceBackward& p, int64_t begin, int64_t end) {
  const int64_t num_experts = p.num_experts;
  for (int64_t token = begin; token < end; ++token) {
    const float* const s = p.scores + token * num_experts;
    const float* const c = p.coefficients + token / p.sequence_length * num_experts;
    float* const ds = p.dscores + token * num_experts;
    if (p.valid != nullptr && !p.valid[token]) {
      std::fill_n(ds, num_experts, 0.0f);
      continue;
    }
    const float total = sum_row(s, num_experts) + 1e-20f;
    const float mean = dot_rows(c, s, num_experts) / total;
    const float factor = *p.dloss / total;
    for (int64_t e = 0; e < num_experts; ++e) ds[e] = factor * (c[e] - mean);
  }
}

/// Coefficients and loss of one sequence.
float finish_sequence(const SequenceBalanceForward& p, const BalancePartials& partials,
                      int64_t num_chunks, int64_t sequence) {
  int64_t num_valid = 0;
  for (int64_t c = 0; c < num_chunks; ++c) num_valid += partials.valid[sequence * num_chunks + c];
  float loss = 0.0f;
  for (int64_t e = 0; e < p.num_experts; ++e) {
    float sum = 0.0f;
    int64_t count = 0;
    for (int64_t c = 0; c < num_chunks; ++c) {
      const int64_t item = (sequence * num_chunks + c) * p.num_experts + e;
      sum += partials.sums[item];
      count += partials.counts[item];
    }
    const float coefficient = kernels::detail::balance_coefficient(
        p.num_experts, p.num_experts_per_token, count, num_valid);
    p.coefficients[sequence * p.num_experts + e] = coefficient;
    loss += coefficient * sum;
  }
  return loss;
}

}  // namespace

void sequence_balance_forward(const SequenceBalanceForward& p) {
  kernels::detail::check_balance_shape(p);
  const auto partials = kernels::detail::balance_partials(p);
  const int64_t num_chunks = kernels::detail::balance_chunks(p.sequence_length);
  const int64_t bytes = 16 * kBalanceChunk * p.num_experts;
  parallel_rows(p.num_sequences * num_chunks, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum_chunk(p, partials, num_chunks, i);
  });
  float loss = 0.0f;
  for (int64_t b = 0; b < p.num_sequences; ++b) loss += finish_sequence(p, partials, num_chunks, b);
  *p.loss = loss;
}

void sequence_balance_backward(const SequenceBalanceBackward& p) {
  parallel_rows(p.num_sequences * p.sequence_length, 16 * p.num_experts,
                [&](int64_t begin, int64_t end) { backward_rows(p, begin, end); });
}

}  // namespace cpu
}  // namespace dsv3::kernels
