#pragma once

#include <string>

#include "base/dtype.h"

// Errors that .cu files throw. Note: nvcc 13 cannot compile fmt 9 as C++20, so base/error.h stays
// out of .cu files.
namespace dsv3::kernels::detail {

/// Throws CudaError: [name] what: reason.
[[noreturn]] void raise_cuda(const char* name, const char* what, const char* reason);

/// Throws std::invalid_argument: [name] message.
[[noreturn]] void raise_invalid(const char* name, const std::string& message);

/// Throws std::invalid_argument: the operation has no body for `dtype`.
[[noreturn]] void raise_dtype(const char* name, DType dtype);

}  // namespace dsv3::kernels::detail
