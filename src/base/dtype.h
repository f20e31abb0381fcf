#pragma once

#include <cstdint>

namespace dsv3 {

/// Element types that cross the kernels' boundary.
enum class DType : uint8_t { kF32, kBF16, kF64, kF8E4M3, kI32, kI64 };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
      return 2;
    case DType::kF8E4M3:
      return 1;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return "fp64";
    case DType::kI64:
      return "int64";
    case DType::kF32:
      return "fp32";
    case DType::kI32:
      return "int32";
    case DType::kBF16:
      return "bf16";
    case DType::kF8E4M3:
      return "fp8_e4m3";
  }
  return "?";
}

}  // namespace dsv3
