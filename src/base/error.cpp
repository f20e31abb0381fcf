#include "base/error.h"

namespace dsv3::detail {

void check_failed(const char* file, int line, const char* condition, const std::string& message) {
  throw std::logic_error(
      fmt::format("{}:{}: internal error: {} ({})", file, line, message, condition));
}

}  // namespace dsv3::detail
