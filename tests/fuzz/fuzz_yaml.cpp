// A config in YAML. What loads prints back to itself; what does not names a place.
#include "config/load.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsv3;
  const std::string_view text = fuzz::text_of(data, size);
  // A file named in the text would be read: that is another reader's target.
  if (text.find("deepspeed") != std::string_view::npos) return 0;
  try {
    const Config config = load_config_text(text, "fuzz.yaml");
    fuzz::check(load_config_text(to_yaml(config), "again.yaml") == config,
                "a config does not print back to itself");
  } catch (const ConfigErrors& errors) {
    fuzz::check(!errors.errors.empty(), "an error without a message");
    for (const auto& line : errors.errors)
      fuzz::check(line.starts_with("fuzz.yaml") || line.starts_with("model") ||
                      line.find(": ") != std::string::npos,
                  "an error names no place");
  }
  return 0;
}
