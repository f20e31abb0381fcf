#pragma once

#include <span>
#include <string_view>

namespace dsv3 {

/// A preset: keys of a config in YAML, read before the user's own, which win.
struct Preset {
  std::string_view name;
  std::string_view yaml;
};

std::span<const Preset> presets();

}  // namespace dsv3
