// manifest.json: as it comes, and as the body of one whose checksum is right. No accepted name
// leads out of the checkpoint's directory.
#include "base/hash.h"
#include "checkpoint/manifest.h"
#include "fuzz/fuzz.h"

namespace {

void read(std::string_view text) {
  using namespace dsv3;
  fuzz::accepts([&] {
    const Manifest manifest = parse_manifest(text, "run/checkpoints/step_1/manifest.json");
    for (const auto& [name, file] : manifest.files) {
      const auto place = (std::filesystem::path("/run/step_1") / name).lexically_normal();
      fuzz::check(place.parent_path() == "/run/step_1", "a name leads out of the directory");
    }
    fuzz::check(parse_manifest(to_text(manifest), "again") == manifest,
                "a manifest does not read back");
  });
}

/// The text as the body of a manifest whose own checksum is right.
std::string with_checksum(std::string_view body) {
  return fmt::format("{}  \"manifest_xxh3\": \"{:016x}\"\n}}\n", body, dsv3::hash_bytes(body, 0));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto text = dsv3::fuzz::text_of(data, size);
  read(text);
  read(with_checksum(text));
  return 0;
}
