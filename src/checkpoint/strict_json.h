#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"

// For the readers of this room: JSON that a stranger may have written.
namespace dsv3::detail {

/// Throws IoError `PATH: message`.
template <typename... Args>
[[noreturn]] void broken(const std::filesystem::path& path, fmt::format_string<Args...> format,
                         Args&&... args) {
  throw IoError(
      fmt::format("{}: {}", path.string(), fmt::format(format, std::forward<Args>(args)...)));
}

/// Untrusted names in messages: cut and without control characters.
std::string shown(std::string_view name);

/// Whether `name` is a plain file name: it leads neither up nor down nor elsewhere.
bool is_file_name(std::string_view name);

/// Parses JSON with bounded depth and no repeated keys. `what` stands for it in the IoError.
nlohmann::json parse_strictly(std::string_view text, const std::filesystem::path& path,
                              const char* what);

}  // namespace dsv3::detail
