#pragma once

#include <string>
#include <vector>

#include "config/config.h"

namespace dsv3 {

/// A key whose values differ between two configs, each value on one line as in YAML.
struct ConfigDifference {
  std::string key;  // full path
  std::string first, second;
};

/// Every key in which two resolved configs differ, in the order of printing.
std::vector<ConfigDifference> config_differences(const Config& first, const Config& second);

}  // namespace dsv3
