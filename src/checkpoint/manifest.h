#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

// manifest.json: what a checkpoint consists of. Written last; a directory without it is none of
// ours, or no longer whole. No LibTorch here.
namespace dsv3 {

inline constexpr const char* kManifestName = "manifest.json";

struct Manifest {
  struct File {
    uint64_t bytes = 0;
    uint64_t checksum = 0;  // XXH3, 64 bits
    bool operator==(const File&) const = default;
  };
  int64_t step = 0;
  std::map<std::string, File> files;  // every file of the directory but the manifest itself
  bool operator==(const Manifest&) const = default;

  uint64_t total_bytes() const;
};

/// JSON; its last entry is a checksum of the text before it, so that any changed byte shows.
std::string to_text(const Manifest& manifest);

/// Reads what to_text() wrote. `path` stands for the file in messages. Throws IoError on anything
/// else: another format or version, a checksum that is wrong, names that lead out of the directory.
Manifest parse_manifest(std::string_view text, const std::filesystem::path& path);

/// parse_manifest of `directory`/manifest.json. Throws IoError, also where there is none.
Manifest read_manifest(const std::filesystem::path& directory);

/// N of a path that ends in step_N; -1 for other names.
int64_t step_of(const std::filesystem::path& checkpoint);

enum class Check : uint8_t {
  kSizes,     // the manifest, and every file's presence and size
  kChecksums  // every byte besides
};

/// What is wrong with a checkpoint directory, one "FILE: cause" each; empty when it is whole. Files
/// that the manifest does not name count as wrong, since nobody knows what they would change, and
/// so does a directory step_N with the manifest of another step.
std::vector<std::string> find_damage(const std::filesystem::path& directory, Check check);

}  // namespace dsv3
