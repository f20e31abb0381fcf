// JSON of strangers: a DeepSpeed config, a config.json of a released model, a run's state.json.
#include "checkpoint/hf_config.h"
#include "config/load.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsv3;
  const std::string text(fuzz::text_of(data, size));
  try {
    const Config config = load_config_text("", "fuzz.yaml", {}, DeepSpeedText{text, "fuzz.json"});
    fuzz::check(load_config_text(to_yaml(config), "again.yaml") == config,
                "a config does not print back to itself");
  } catch (const ConfigErrors& errors) {
    fuzz::check(!errors.errors.empty(), "an error without a message");
  }
  fuzz::accepts([&] {
    const HfConfig described = parse_hf_config(text, "config.json");
    fuzz::accepts([&] { parse_hf_config(to_hf_config(described.model), "again.json"); });
  });
  return 0;
}
