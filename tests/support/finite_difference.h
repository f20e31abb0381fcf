#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "support/random.h"

namespace dsv3::test {

/// Holds gradients against central differences of `objective` (float64 tensors to a number) at
/// `inputs`, along one random direction of all inputs together: the slope that the gradients
/// predict may differ by `most` of the sum of the products' magnitudes.
inline ::testing::AssertionResult agrees_with_differences(
    const std::function<double(const std::vector<at::Tensor>&)>& objective,
    const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& gradients, Random& random,
    double most) {
  constexpr double kStep = 1e-5;
  std::vector<at::Tensor> ahead, behind;
  double slope = 0.0, magnitude = 0.0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor x = inputs[i].detach().to(at::kCPU, at::kDouble);
    const at::Tensor direction = random.normal(x.sizes(), at::kDouble);
    ahead.push_back(x.add(direction, kStep));
    behind.push_back(x.sub(direction, kStep));
    const at::Tensor terms = gradients[i].detach().to(at::kCPU, at::kDouble).mul(direction);
    slope += terms.sum().item<double>();
    magnitude += terms.norm().item<double>();
  }
  const double difference = (objective(ahead) - objective(behind)) / (2.0 * kStep);
  if (std::abs(difference - slope) <= most * magnitude) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << "differences give a slope of " << difference << ", the gradients " << slope
         << " (allowed " << most << " of " << magnitude << ")";
}

}  // namespace dsv3::test
