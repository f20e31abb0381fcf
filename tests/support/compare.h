#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <string>

namespace dsv3::test {

/// What separates one rounding from the next one of the type: 2^-23 for FP32, 2^-7 for BF16.
inline double epsilon(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return 0x1p-7;
  if (dtype == at::kFloat) return 0x1p-23;
  return 0x1p-52;
}

/// Bound on the relative error (norm) after `roundings` independent roundings: each errs by eps/2
/// at most, independent errors add up as a root, and √2 is the margin. BF16: 0.0078 for 2, 0.011
/// for 4.
inline double tolerance(at::ScalarType dtype, double roundings = 2.0) {
  return std::sqrt(roundings / 2.0) * epsilon(dtype);
}

/// ‖actual - expected‖ / ‖expected‖ in float64; absolute where expected is all zero, infinity where
/// either holds NaN or infinity that the other does not.
inline double relative_error(const at::Tensor& actual, const at::Tensor& expected) {
  if (expected.numel() == 0) return 0.0;
  const at::Tensor a = actual.detach().to(at::kCPU, at::kDouble);
  const at::Tensor e = expected.detach().to(at::kCPU, at::kDouble);
  const double difference = a.sub(e).norm().item<double>();
  const double norm = e.norm().item<double>();
  const double error = norm > 0.0 ? difference / norm : difference;
  return std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
}

inline std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << c10::toString(tensor.scalar_type()) << " " << tensor.sizes() << " on "
       << tensor.device().str();
  return text.str();
}

/// The element that differs most, with its index and both values.
inline std::string worst_element(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor a = actual.detach().to(at::kCPU, at::kDouble).contiguous();
  const at::Tensor e = expected.detach().to(at::kCPU, at::kDouble).contiguous();
  const auto* x = a.const_data_ptr<double>();
  const auto* y = e.const_data_ptr<double>();
  int64_t worst = 0;
  double most = -1.0;
  for (int64_t i = 0; i < a.numel(); ++i) {
    const double d = x[i] == y[i] ? 0.0 : std::abs(x[i] - y[i]);
    if (!(d <= most)) {
      most = d;
      worst = i;
      if (std::isnan(d)) break;
    }
  }
  std::string index;
  int64_t rest = worst;
  for (int64_t dim = a.dim() - 1; dim >= 0; --dim) {
    index = std::to_string(rest % a.size(dim)) + (index.empty() ? "" : ", " + index);
    rest /= a.size(dim);
  }
  std::ostringstream text;
  text.precision(9);
  text << "worst element [" << index << "]: " << x[worst] << ", expected " << y[worst];
  return text.str();
}

/// EXPECT_TRUE(close(actual, expected, tolerance(dtype))).
inline ::testing::AssertionResult close(const at::Tensor& actual, const at::Tensor& expected,
                                        double most) {
  if (!actual.defined() || !expected.defined()) {
    return ::testing::AssertionFailure()
           << (actual.defined() ? "expected" : "actual") << " is undefined";
  }
  if (actual.sizes() != expected.sizes()) {
    return ::testing::AssertionFailure()
           << "shapes differ: " << describe(actual) << ", expected " << describe(expected);
  }
  const double error = relative_error(actual, expected);
  if (error <= most) return ::testing::AssertionSuccess() << "relative error " << error;
  return ::testing::AssertionFailure()
         << describe(actual) << ": relative error " << error << ", allowed " << most << "; "
         << worst_element(actual, expected);
}

/// As close(), but the error is measured against `magnitude`: the sum of the absolute values of the
/// terms that make the result. For few elements whose terms may cancel.
inline ::testing::AssertionResult close_to_terms(const at::Tensor& actual,
                                                 const at::Tensor& expected,
                                                 const at::Tensor& magnitude, double most) {
  if (actual.sizes() != expected.sizes()) return close(actual, expected, most);
  if (expected.numel() == 0) return ::testing::AssertionSuccess();
  const at::Tensor a = actual.detach().to(at::kCPU, at::kDouble);
  const at::Tensor e = expected.detach().to(at::kCPU, at::kDouble);
  const double error = a.sub(e).norm().item<double>();
  const double size = magnitude.detach().to(at::kCPU, at::kDouble).norm().item<double>();
  if (error <= most * size) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << describe(actual) << ": error " << error << ", allowed " << most << " of " << size
         << "; " << worst_element(actual, expected);
}

/// Equal shape, dtype and bits (NaN equals NaN of the same bits).
inline ::testing::AssertionResult same_bits(const at::Tensor& actual, const at::Tensor& expected) {
  if (actual.sizes() != expected.sizes() || actual.scalar_type() != expected.scalar_type()) {
    return ::testing::AssertionFailure() << describe(actual) << " against " << describe(expected);
  }
  const at::Tensor a = actual.detach().cpu().contiguous(), e = expected.detach().cpu().contiguous();
  if (a.nbytes() == 0 || std::memcmp(a.const_data_ptr(), e.const_data_ptr(), a.nbytes()) == 0) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << describe(a) << ": " << worst_element(a, e);
}

}  // namespace dsv3::test
