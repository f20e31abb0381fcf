#include "cli/self_test.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>

#include <exception>

namespace dsv3::cli {
namespace {

// NUMERICS: operators in BF16 against float64, relative to the norm. FP32 sums of up to a few
// hundred terms stay well below 1e-5.
constexpr double kBarFp32 = 1e-5;
constexpr double kBarBf16 = 1e-2;

double norm(const at::Tensor& x) {
  return at::linalg_vector_norm(x).item<double>();
}

double relative_error(const at::Tensor& got, const at::Tensor& expected) {
  const at::Tensor e = expected.detach().to(at::kCPU, at::kDouble);
  const at::Tensor g = got.detach().to(at::kCPU, at::kDouble);
  if (g.sizes() != e.sizes()) throw std::runtime_error("a result has the wrong shape");
  const double scale = norm(e);
  const double error = norm(g.sub(e));
  return scale > 0 ? error / scale : error;
}

SelfTestResult run_one(const SelfTest& test, at::Device device, at::ScalarType dtype) {
  const bool fp32 = dtype == at::kFloat;
  SelfTestResult result{.name = test.name,
                        .device = device.is_cuda() ? "cuda" : "cpu",
                        .dtype = fp32 ? "fp32" : "bf16",
                        .error = 0,
                        .bar = fp32 ? kBarFp32 : kBarBf16,
                        .message = ""};
  try {
    SelfTestSetup setup{device, dtype, std::mt19937_64(20241226)};
    for (const auto& [got, expected] : test.run(setup)) {
      const double error = relative_error(got, expected);
      if (!(error <= result.error)) result.error = error;  // keeps a NaN
    }
  } catch (const std::exception& error) {
    const std::string text = error.what();
    result.message = text.substr(0, text.find('\n'));
  }
  return result;
}

}  // namespace

at::Tensor SelfTestSetup::normal(at::IntArrayRef shape) {
  const at::Tensor x = at::empty(shape, at::kDouble);
  std::normal_distribution<double> distribution;
  double* data = x.data_ptr<double>();
  for (int64_t i = 0; i < x.numel(); ++i) data[i] = distribution(random);
  return x.to(dtype).to(at::kDouble);
}

at::Tensor SelfTestSetup::integers(at::IntArrayRef shape, int32_t below) {
  const at::Tensor x = at::empty(shape, at::kInt);
  std::uniform_int_distribution<int32_t> distribution(0, below - 1);
  int32_t* data = x.data_ptr<int32_t>();
  for (int64_t i = 0; i < x.numel(); ++i) data[i] = distribution(random);
  return x;
}

at::Tensor SelfTestSetup::place(const at::Tensor& host) const {
  return host.detach().to(device, dtype).clone().requires_grad_(true);
}

at::Tensor SelfTestSetup::move(const at::Tensor& host) const {
  return host.to(device);
}

std::vector<SelfTestResult> run_self_tests(bool cuda) {
  std::vector<SelfTest> tests = layer_self_tests();
  for (const SelfTest& test : routing_self_tests()) tests.push_back(test);
  for (const SelfTest& test : fp8_self_tests()) tests.push_back(test);
  for (const SelfTest& test : training_self_tests()) tests.push_back(test);
  std::vector<at::Device> devices = {at::kCPU};
  if (cuda) devices.emplace_back(at::kCUDA, 0);
  std::vector<SelfTestResult> results;
  for (const SelfTest& test : tests) {
    for (const at::Device device : devices) {
      results.push_back(run_one(test, device, at::kFloat));
      if (!test.fp32_only) results.push_back(run_one(test, device, at::kBFloat16));
    }
  }
  return results;
}

}  // namespace dsv3::cli
