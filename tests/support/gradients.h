#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "ops/weight.h"
#include "support/compare.h"
#include "support/random.h"

// An operator's test runs one computation three times: by our operator, in float64 by the reference
// that ATen differentiates (the oracle), and in the same narrow dtype by ATen's own operators.

namespace dsv3::test {

/// Device and dtype of a parametrised test, with its name in the output.
struct Place {
  at::Device device;
  at::ScalarType dtype;
};

inline std::vector<Place> places() {
  std::vector<Place> result;
  for (const auto& device : devices()) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) result.push_back({device, dtype});
  }
  return result;
}

inline std::string place_name(const ::testing::TestParamInfo<Place>& info) {
  return std::string(info.param.device.is_cuda() ? "cuda_" : "cpu_") +
         c10::toString(info.param.dtype);
}

/// A leaf of `dtype` on `device` with the values of `data`, recording gradients.
inline at::Tensor leaf(const at::Tensor& data, at::ScalarType dtype, at::Device device = at::kCPU) {
  return data.detach().to(device, dtype).clone().requires_grad_();
}

/// A weight whose bucket (of `bucket_dtype`) already holds `start`.
inline ops::Weight weight_of(const at::Tensor& data, at::ScalarType dtype, at::Device device,
                             at::ScalarType bucket_dtype, double start = 0.0) {
  ops::Weight weight{leaf(data, dtype, device), {}};
  weight.grad =
      at::zeros(data.sizes(), weight.value.options().dtype(bucket_dtype).requires_grad(false));
  weight.grad.fill_(start);
  return weight;
}

/// Backpropagates `grads` (cast to each output's dtype and device) through `outputs`, once.
inline void backward(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& grads) {
  at::Tensor objective;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const at::Tensor term =
        outputs[i].mul(grads[i].to(outputs[i].device(), outputs[i].scalar_type())).sum();
    objective = objective.defined() ? objective.add(term) : term;
  }
  objective.backward();
}

/// Named tensors of one run: results and gradients.
using Named = std::vector<std::pair<std::string, at::Tensor>>;

/// FP32: 30 roundings of it. BF16: DESIGN §6, at most 1e-2 and, where there are elements enough for
/// the ratio of two error norms to mean something, at most 1.2 times the error of ATen's own
/// composition in BF16 (2e-6 more, for results that are exact there).
inline void expect_agree(const Named& ours, const Named& oracle, const Named& composed) {
  constexpr int64_t kEnough = 1000;
  ASSERT_EQ(ours.size(), oracle.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    SCOPED_TRACE(ours[i].first);
    const at::Tensor& value = ours[i].second;
    ASSERT_TRUE(value.defined());
    double most = composed.empty() ? tolerance(at::kFloat, 30) : 1e-2;
    if (!composed.empty() && value.numel() >= kEnough) {
      most = std::min(most, 1.2 * relative_error(composed[i].second, oracle[i].second) + 2e-6);
    }
    EXPECT_TRUE(close(value, oracle[i].second, most));
  }
}

}  // namespace dsv3::test
