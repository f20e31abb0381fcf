#pragma once

#include <cstdint>
#include <random>
#include <span>

namespace dsv3 {

/// How the next token is drawn from its distribution.
struct SamplingOptions {
  double temperature =
      1.0;             // logits are divided by it; 0 = always the likeliest (lowest id on a tie)
  int64_t top_k = 0;   // only the k likeliest; 0 = all
  double top_p = 1.0;  // only the fewest likeliest that together reach p; (0, 1]

  /// Throws std::invalid_argument with the value and its range.
  void check() const;
};

/// Random numbers that are the same on every platform for one seed.
class SamplingRandom {
 public:
  explicit SamplingRandom(uint64_t seed) : engine_(seed) {}
  /// Uniform in [0, 1), 53 bits.
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

 private:
  std::mt19937_64 engine_;
};

/// An id drawn from softmax(logits / temperature), cut to top_k and then to top_p of what is left,
/// and renormalised; sums in float64. A logit of -inf is never drawn. Throws std::invalid_argument
/// when `logits` is empty or holds NaN, +inf, or nothing finite.
int64_t sample_token(std::span<const float> logits, const SamplingOptions& options,
                     SamplingRandom& random);

}  // namespace dsv3
