#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace dsv3 {

/// A file, directory or stream failed: the message names the path and the cause.
struct IoError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A CUDA call or launch failed: the message names the call.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Communication between ranks failed.
struct CommError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Throws std::invalid_argument: the caller, the config or the user's input is wrong.
template <typename... Args>
[[noreturn]] void invalid(fmt::format_string<Args...> format, Args&&... args) {
  throw std::invalid_argument(fmt::format(format, std::forward<Args>(args)...));
}

/// Throws std::invalid_argument with the formatted message unless `condition` holds.
template <typename... Args>
void require(bool condition, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) invalid(format, std::forward<Args>(args)...);
}

namespace detail {
[[noreturn]] void check_failed(const char* file, int line, const char* condition,
                               const std::string& message);
}  // namespace detail

}  // namespace dsv3

/// An invariant of ours: throws std::logic_error with place, condition and message when it fails.
#define DSV3_CHECK(condition, ...)                                                            \
  do {                                                                                        \
    if (!(condition)) [[unlikely]]                                                            \
      ::dsv3::detail::check_failed(__FILE__, __LINE__, #condition, fmt::format(__VA_ARGS__)); \
  } while (false)
