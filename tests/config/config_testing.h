#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "config/load.h"

namespace dsv3::testing {

/// The errors of a config named run.yaml; empty when it loads.
inline std::vector<std::string> errors_of(const std::string& yaml,
                                          const std::vector<std::string>& overrides = {},
                                          const std::string& deepspeed = "") {
  try {
    std::optional<DeepSpeedText> json;
    if (!deepspeed.empty()) json = {deepspeed, "ds.json"};
    load_config_text(yaml, "run.yaml", overrides, json);
  } catch (const ConfigErrors& error) {
    return error.errors;
  }
  return {};
}

/// The one error of a config; a failure when there are none or several.
inline std::string error_of(const std::string& yaml, const std::vector<std::string>& overrides = {},
                            const std::string& deepspeed = "") {
  const auto errors = errors_of(yaml, overrides, deepspeed);
  EXPECT_EQ(errors.size(), 1u) << ::testing::PrintToString(errors);
  return errors.empty() ? "" : errors.front();
}

inline Config load(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
  return load_config_text(yaml, "run.yaml", overrides);
}

}  // namespace dsv3::testing
