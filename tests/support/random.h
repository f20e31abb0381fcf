#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace dsv3::test {

/// A new seed each time, so that every run draws other cases; DSV3_TEST_SEED repeats a failure.
/// Print it: SCOPED_TRACE(seed_text(seed)).
inline uint64_t fresh_seed() {
  if (const char* given = std::getenv("DSV3_TEST_SEED")) return std::strtoull(given, nullptr, 10);
  return std::random_device()();
}

inline std::string seed_text(uint64_t seed) {
  return "repeat with DSV3_TEST_SEED=" + std::to_string(seed);
}

/// The CPU, and CUDA where this program and machine have it. For INSTANTIATE_TEST_SUITE_P.
inline std::vector<at::Device> devices() {
  std::vector<at::Device> result{at::Device(at::kCPU)};
  if (at::hasCUDA()) result.emplace_back(at::kCUDA, static_cast<c10::DeviceIndex>(0));
  return result;
}

/// Draws test data; the same seed gives the same values on every device.
class Random {
 public:
  explicit Random(uint64_t seed) : generator_(seed) {}

  int64_t integer(int64_t low, int64_t high) {  // both ends included
    return std::uniform_int_distribution<int64_t>(low, high)(generator_);
  }
  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(generator_);
  }
  double normal() { return std::normal_distribution<double>()(generator_); }

  /// mean + std · N(0, 1), drawn in float64 and rounded to `dtype`.
  at::Tensor normal(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device = at::kCPU,
                    double std = 1.0, double mean = 0.0) {
    at::Tensor values = at::empty(sizes, at::TensorOptions(at::kDouble));
    std::normal_distribution<double> distribution(mean, std);
    auto* data = values.mutable_data_ptr<double>();
    for (int64_t i = 0; i < values.numel(); ++i) data[i] = distribution(generator_);
    return values.to(device, dtype);
  }

  /// Integers in [0, end), int32.
  at::Tensor integers(at::IntArrayRef sizes, int64_t end, at::Device device = at::kCPU) {
    at::Tensor values = at::empty(sizes, at::TensorOptions(at::kInt));
    auto* data = values.mutable_data_ptr<int32_t>();
    for (int64_t i = 0; i < values.numel(); ++i)
      data[i] = static_cast<int32_t>(integer(0, end - 1));
    return values.to(device);
  }

 private:
  std::mt19937_64 generator_;
};

}  // namespace dsv3::test
