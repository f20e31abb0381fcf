// The configs that we ship, and their document.
#include <filesystem>

#include "base/file.h"
#include "config_testing.h"

namespace dsv3 {
namespace {

const std::filesystem::path kConfigs = std::filesystem::path(DSV3_SOURCE_DIR) / "configs";

TEST(ShippedConfigs, LoadAndPrintBack) {
  int found = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kConfigs)) {
    if (entry.path().extension() != ".yaml") continue;
    SCOPED_TRACE(entry.path().string());
    ++found;
    Config config;
    ASSERT_NO_THROW(config = load_config(entry.path()));
    EXPECT_EQ(testing::load(to_yaml(config)), config);
    EXPECT_NO_THROW(load_config(entry.path(), {}, kConfigs / "deepspeed_config.json"));
  }
  EXPECT_GE(found, 6);
}

TEST(ShippedConfigs, BaseIsThePublishedModel) {
  const Config config = load_config(kConfigs / "deepseek_v3_base.yaml");
  Config preset = preset_config("deepseek_v3");
  EXPECT_EQ(config.model, preset.model);
  EXPECT_EQ(num_processes(config.parallel), 2048);
  // The configured steps read the report's 14.8 T tokens.
  int64_t tokens = 0;
  for (int64_t step = 0; step < config.training.steps; ++step)
    tokens += global_batch_at(config, step, tokens) * config.data.sequence_length;
  EXPECT_NEAR(static_cast<double>(tokens), 14.8e12, 1e8);
}

TEST(ShippedConfigs, SmallIsTheSpecifiedModel) {
  const Config config = load_config(kConfigs / "deepseek_v3_small.yaml");
  Config preset = preset_config("small");
  preset.model.preset.clear();
  EXPECT_EQ(config.model, preset.model);
}

TEST(ShippedConfigs, ReadmeHoldsTheTableOfKeys) {
  const std::string readme = read_file(kConfigs / "README.md");
  EXPECT_NE(readme.find(keys_as_markdown()), std::string::npos)
      << "configs/README.md differs from the code: put the output of `dsv3 config --keys` there";
}

}  // namespace
}  // namespace dsv3
