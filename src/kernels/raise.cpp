#include "kernels/detail/raise.h"

#include "base/error.h"

namespace dsv3::kernels::detail {

void raise_cuda(const char* name, const char* what, const char* reason) {
  throw CudaError(fmt::format("[{}] {}: {}", name, what, reason));
}

void raise_invalid(const char* name, const std::string& message) {
  invalid("[{}] {}", name, message);
}

void raise_dtype(const char* name, DType dtype) {
  invalid("[{}] dtype: expected fp32 or bf16, got {}", name, name_of(dtype));
}

}  // namespace dsv3::kernels::detail
