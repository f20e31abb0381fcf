#include "ops/dispatch.h"

#include <ATen/core/Tensor.h>

#include <string>

#include "base/error.h"

namespace dsv3::ops {
namespace {

std::string shape_text(c10::IntArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i > 0) text += ", ";
    text += sizes[i] < 0 ? "*" : std::to_string(sizes[i]);
  }
  return text + "]";
}

}  // namespace

DType dtype_of(const at::Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kF32;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kDouble:
      return DType::kF64;
    case at::kFloat8_e4m3fn:
      return DType::kF8E4M3;
    case at::kInt:
      return DType::kI32;
    case at::kLong:
      return DType::kI64;
    default:
      invalid("[{}] {}: unsupported dtype {}", op, name, c10::toString(tensor.scalar_type()));
  }
}

bool has_kernel(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16;
}

void check_shape(const at::Tensor& tensor, const char* op, const char* name,
                 c10::IntArrayRef expected) {
  require(tensor.defined(), "[{}] {}: expected shape {}, got an undefined tensor", op, name,
          shape_text(expected));
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) {
    same = expected[i] < 0 || expected[i] == tensor.size(static_cast<int64_t>(i));
  }
  require(same, "[{}] {}: expected shape {}, got {}", op, name, shape_text(expected),
          shape_text(tensor.sizes()));
}

void check_number(const at::Tensor& tensor, const char* op, const char* name) {
  require(has_kernel(tensor) || tensor.scalar_type() == at::kDouble,
          "[{}] {}: expected dtype Float, BFloat16 or Double, got {}", op, name,
          c10::toString(tensor.scalar_type()));
}

void check_like(const at::Tensor& tensor, const char* op, const char* name, const at::Tensor& like,
                const char* like_name) {
  require(tensor.scalar_type() == like.scalar_type(), "[{}] {}: expected dtype {} (as {}), got {}",
          op, name, c10::toString(like.scalar_type()), like_name,
          c10::toString(tensor.scalar_type()));
  require(tensor.device() == like.device(), "[{}] {}: expected device {} (as {}), got {}", op, name,
          like.device().str(), like_name, tensor.device().str());
}

void check_int32(const at::Tensor& tensor, const char* op, const char* name,
                 const at::Tensor& like) {
  require(tensor.scalar_type() == at::kInt, "[{}] {}: expected dtype Int, got {}", op, name,
          c10::toString(tensor.scalar_type()));
  require(tensor.device() == like.device(), "[{}] {}: expected device {}, got {}", op, name,
          like.device().str(), tensor.device().str());
}

void check_bucket(const at::Tensor& bucket, const char* op, c10::IntArrayRef expected,
                  const at::Tensor& like) {
  constexpr const char* kName = "weight gradient";
  check_shape(bucket, op, kName, expected);
  require(bucket.is_contiguous() && bucket.device() == like.device(),
          "[{}] {}: expected a contiguous tensor on {}", op, kName, like.device().str());
}

at::Tensor rows_contiguous(const at::Tensor& tensor) {
  return tensor.dim() == 0 || tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor
                                                                             : tensor.contiguous();
}

}  // namespace dsv3::ops
