#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "base/error.h"
#include "mla/mla.h"

namespace dsv3 {
namespace {

/// YaRN's attention temperature (arXiv:2309.00071 eq. 15, with a weight on the logarithm).
double temperature(double factor, double weight) {
  return factor <= 1.0 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0;
}

/// What cos and sin are multiplied by: 1 where numerator and denominator agree (V3).
double amplitude(const RopeConfig& rope) {
  if (rope.type != RopeConfig::Type::kYarn) return 1.0;
  if (rope.mscale == 0.0 || rope.mscale_all_dim == 0.0) return temperature(rope.factor, 1.0);
  return temperature(rope.factor, rope.mscale) / temperature(rope.factor, rope.mscale_all_dim);
}

/// The (fractional) pair that turns `rotations` times over the original context.
double pair_of(const RopeConfig& rope, double rotations, int64_t dim) {
  const auto length = static_cast<double>(rope.original_max_position_embeddings);
  return static_cast<double>(dim) * std::log(length / (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(rope.theta));
}

/// Radians per position of each pair. YaRN keeps pairs below the correction range, slows those
/// above it by `factor`, and blends between (arXiv:2309.00071 §3.2); the range is rounded outwards
/// to whole pairs.
std::vector<double> frequencies(const RopeConfig& rope, int64_t dim) {
  std::vector<double> result(static_cast<size_t>(dim / 2));
  for (int64_t i = 0; i < dim / 2; ++i) {
    result[static_cast<size_t>(i)] =
        std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
  }
  if (rope.type != RopeConfig::Type::kYarn) return result;
  const double low = std::max(std::floor(pair_of(rope, rope.beta_fast, dim)), 0.0);
  const double bound = static_cast<double>(dim - 1);
  double high = std::min(std::ceil(pair_of(rope, rope.beta_slow, dim)), bound);
  if (high == low) high += 0.001;
  for (int64_t i = 0; i < dim / 2; ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    double& frequency = result[static_cast<size_t>(i)];
    frequency = frequency * (1.0 - ramp) + frequency / rope.factor * ramp;
  }
  return result;
}

}  // namespace

at::Tensor rope_table(const RopeConfig& rope, int64_t qk_rope_head_dim, int64_t num_positions) {
  require(qk_rope_head_dim > 0 && qk_rope_head_dim % 2 == 0,
          "qk_rope_head_dim: expected a positive even number, got {}", qk_rope_head_dim);
  require(num_positions >= 0, "number of positions: expected >= 0, got {}", num_positions);
  const auto speed = frequencies(rope, qk_rope_head_dim);
  const double scale = amplitude(rope);
  at::Tensor table = at::empty({num_positions, qk_rope_head_dim}, at::TensorOptions(at::kFloat));
  auto* row = table.mutable_data_ptr<float>();
  for (int64_t position = 0; position < num_positions; ++position, row += qk_rope_head_dim) {
    for (size_t pair = 0; pair < speed.size(); ++pair) {
      const double angle = static_cast<double>(position) * speed[pair];
      row[2 * pair] = static_cast<float>(scale * std::cos(angle));
      row[2 * pair + 1] = static_cast<float>(scale * std::sin(angle));
    }
  }
  return table;
}

double softmax_scale(const ModelConfig& config) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(config.mla.qk_head_dim()));
  const auto& rope = config.rope;
  if (rope.type != RopeConfig::Type::kYarn || rope.mscale_all_dim == 0.0) return scale;
  const double mscale = temperature(rope.factor, rope.mscale_all_dim);
  return scale * mscale * mscale;
}

}  // namespace dsv3
