// Stable counting sort of choices by expert on the host: two passes over T·K ids, too short to
// share between threads.

#include "kernels/detail/permutation.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/routing.h"

namespace dsv3::kernels {

int64_t permutation_workspace(int64_t num_choices, int32_t num_experts) {
  return std::max<int64_t>(1, detail::permutation_chunks(num_choices)) * num_experts;
}

int64_t permutation_rows(int64_t num_choices, int32_t num_experts, int32_t row_multiple) {
  const int64_t used = std::min<int64_t>(num_choices, num_experts);
  return (num_choices + used * (row_multiple - 1)) / row_multiple * row_multiple;
}

namespace detail {

void check_permutation_shape(const MakePermutation& p) {
  require(p.num_experts >= 1 && p.num_experts <= kMaxExperts,
          "[make_permutation] num_experts: expected 1 to {}, got {}", kMaxExperts, p.num_experts);
  require(
      p.num_tokens >= 0 && p.num_experts_per_token >= 1 && p.num_experts_per_token <= kMaxChoices &&
          p.num_tokens * p.num_experts_per_token < (int64_t{1} << 31) - kPermutationChunk,
      "[make_permutation] experts: expected [T, 1 to {}] with fewer than 2^31 - 1024 entries, got "
      "[{}, {}]",
      kMaxChoices, p.num_tokens, p.num_experts_per_token);
  constexpr int64_t kMostRows = (int64_t{1} << 31) - kPermutationChunk;
  require(p.row_multiple >= 1 && p.row_multiple < kMostRows &&
              permutation_rows(p.num_tokens * p.num_experts_per_token, p.num_experts,
                               p.row_multiple) < kMostRows,
          "[make_permutation] row_multiple: expected at least 1 and fewer than 2^31 - 1024 rows "
          "with padding, got {}",
          p.row_multiple);
}

}  // namespace detail

namespace cpu {

void make_permutation(const MakePermutation& p) {
  kernels::detail::check_permutation_shape(p);
  const int64_t num_choices = p.num_tokens * p.num_experts_per_token;
  std::fill_n(p.counts, p.num_experts, 0);
  for (int64_t i = 0; i < num_choices; ++i) {
    require(p.experts[i] >= 0 && p.experts[i] < p.num_experts,
            "[make_permutation] experts: expected ids 0 to {}, got {}", p.num_experts - 1,
            p.experts[i]);
    ++p.counts[p.experts[i]];
  }
  int32_t next_row[kMaxExperts];
  int32_t end = 0;
  for (int32_t e = 0; e < p.num_experts; ++e) {
    next_row[e] = end;
    end += (p.counts[e] + p.row_multiple - 1) / p.row_multiple * p.row_multiple;
    p.offsets[e] = end;
    std::fill(p.choice_of + next_row[e] + p.counts[e], p.choice_of + end, -1);
  }
  std::fill(p.choice_of + end,
            p.choice_of + permutation_rows(num_choices, p.num_experts, p.row_multiple), -1);
  for (int64_t i = 0; i < num_choices; ++i) {
    const int32_t row = next_row[p.experts[i]]++;
    p.row_of[i] = row;
    p.choice_of[row] = static_cast<int32_t>(i);
  }
}

}  // namespace cpu
}  // namespace dsv3::kernels
