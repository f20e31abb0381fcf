#pragma once

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdint>
#include <string>

namespace dsv3::cli {

/// Accepts whole numbers from `least` on. CLI11's own bounds are doubles: they name the largest
/// one, in 309 digits.
inline CLI::Validator at_least(int64_t least, const std::string& name) {
  return CLI::Validator(
      [least](const std::string& given) {
        int64_t number = 0;
        const char* const end = given.data() + given.size();
        const auto [stop, error] = std::from_chars(given.data(), end, number);
        if (error == std::errc() && stop == end && number >= least) return std::string();
        return "expected a whole number from " + std::to_string(least) + " on, got '" + given + "'";
      },
      name);
}
inline CLI::Validator positive() {
  return at_least(1, "POSITIVE");
}
inline CLI::Validator non_negative() {
  return at_least(0, "NONNEGATIVE");
}

}  // namespace dsv3::cli
