#pragma once

// What the bodies of make_permutation share.

#include <cstdint>

#include "kernels/routing.h"

namespace dsv3::kernels::detail {

/// Choices that one block places.
inline constexpr int kPermutationChunk = 1024;

inline int permutation_chunks(int64_t num_choices) {
  return static_cast<int>((num_choices + kPermutationChunk - 1) / kPermutationChunk);
}

/// Throws std::invalid_argument when a size is out of range.
void check_permutation_shape(const MakePermutation& p);

/// Throws std::invalid_argument on a dtype or number of choices that permute has no body for.
void check_permute(const PermuteForward& p);

}  // namespace dsv3::kernels::detail
