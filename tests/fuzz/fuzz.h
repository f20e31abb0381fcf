#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "base/error.h"

// What every target of tests/fuzz shares. A target fails by any exception but the two that a reader
// promises, by a sanitizer's finding, by one allocation beyond -malloc_limit_mb, or by check().
namespace dsv3::fuzz {

/// A directory of this process on the memory file system where there is one.
inline const std::filesystem::path& scratch() {
  static const struct Scratch {
    std::filesystem::path path;
    Scratch() {
      const bool memory = std::filesystem::is_directory("/dev/shm");
      std::string text = (memory ? "/dev/shm" : "/tmp") + std::string("/dsv3_fuzz_XXXXXX");
      if (::mkdtemp(text.data()) == nullptr) std::abort();
      path = text;
    }
    ~Scratch() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
  } made;
  return made.path;
}

/// Writes `bytes` into a file of the scratch directory.
inline std::filesystem::path put(const char* name, std::string_view bytes) {
  const auto path = scratch() / name;
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return path;
}

inline std::string_view text_of(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

inline void check(bool holds, const char* what) {
  if (holds) return;
  fmt::print(stderr, "broken promise: {}\n", what);
  std::abort();
}

/// Runs a reader: true when it accepted its input, false when it refused it as it may.
template <typename Reader>
bool accepts(Reader&& read) {
  try {
    read();
    return true;
  } catch (const IoError&) {
  } catch (const std::invalid_argument&) {
  }
  return false;
}

}  // namespace dsv3::fuzz
