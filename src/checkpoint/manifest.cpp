#include "checkpoint/manifest.h"

#include <charconv>
#include <system_error>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "checkpoint/strict_json.h"

namespace dsv3 {

namespace fs = std::filesystem;
using detail::broken, detail::is_file_name, detail::shown;

namespace {

constexpr std::string_view kFormat = "dsv3-checkpoint";
constexpr int64_t kVersion = 1;
constexpr std::string_view kChecksumKey = "  \"manifest_xxh3\": \"";
constexpr std::string_view kEnd = "\"\n}\n";
constexpr size_t kDigits = 16;

std::string hex(uint64_t value) {
  return fmt::format("{:016x}", value);
}

bool parse_hex(std::string_view text, uint64_t& value) {
  if (text.size() != kDigits) return false;
  for (const char c : text) {
    if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return false;
  }
  std::from_chars(text.data(), text.data() + text.size(), value, 16);
  return true;
}

/// Throws unless the text ends with the checksum of what stands before it.
void check_own_checksum(std::string_view text, const fs::path& path) {
  const size_t tail = kChecksumKey.size() + kDigits + kEnd.size();
  uint64_t promised = 0;
  const bool formed =
      text.size() > tail && text.ends_with(kEnd) &&
      text.substr(text.size() - tail, kChecksumKey.size()) == kChecksumKey &&
      parse_hex(text.substr(text.size() - kEnd.size() - kDigits, kDigits), promised);
  if (!formed) broken(path, "does not end with its checksum; it was cut or changed");
  const uint64_t actual = hash_bytes(text.substr(0, text.size() - tail), 0);
  if (actual != promised) {
    broken(path, "its checksum is {}, but it says {}; it was changed after it was written",
           hex(actual), hex(promised));
  }
}

Manifest::File parse_file(const std::string& name, const nlohmann::json& entry,
                          const fs::path& path) {
  if (!is_file_name(name) || name == kManifestName)
    broken(path, "'{}' is not the name of a file in the checkpoint", shown(name));
  Manifest::File file;
  if (!entry.is_object() || !entry.contains("bytes") || !entry["bytes"].is_number_unsigned() ||
      !entry.contains("xxh3") || !entry["xxh3"].is_string() ||
      !parse_hex(entry["xxh3"].get_ref<const std::string&>(), file.checksum))
    broken(path, "file '{}': expected {{\"bytes\": count, \"xxh3\": 16 hex digits}}", shown(name));
  file.bytes = entry["bytes"].get<uint64_t>();
  return file;
}

/// What is wrong with one file that the manifest names; empty when nothing is.
std::string damage_of(const fs::path& path, const Manifest::File& file, Check check) {
  std::error_code error;
  const auto status = fs::symlink_status(path, error);
  if (!fs::exists(status)) return "is missing";
  if (!fs::is_regular_file(status)) return "is not a regular file";
  const uint64_t size = fs::file_size(path, error);
  if (error) return fmt::format("cannot be read: {}", error.message());
  if (size != file.bytes)
    return fmt::format("has {} bytes, but the manifest says {}; it was {}", size, file.bytes,
                       size < file.bytes ? "cut" : "changed after it was saved");
  if (check == Check::kSizes) return "";
  const MappedFile mapped(path);
  const auto bytes = mapped.bytes();
  const uint64_t actual =
      hash_bytes({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, 0);
  if (actual == file.checksum) return "";
  return fmt::format(
      "its checksum is {}, but the manifest says {}; it was changed after it was saved",
      hex(actual), hex(file.checksum));
}

}  // namespace

uint64_t Manifest::total_bytes() const {
  uint64_t total = 0;
  for (const auto& [name, file] : files) total += file.bytes;
  return total;
}

std::string to_text(const Manifest& manifest) {
  std::string text = fmt::format(
      "{{\n  \"format\": \"{}\",\n  \"version\": {},\n  \"step\": {},\n  \"files\": {{\n", kFormat,
      kVersion, manifest.step);
  const char* separator = "";
  for (const auto& [name, file] : manifest.files) {
    text += fmt::format("{}    {}: {{\"bytes\": {}, \"xxh3\": \"{}\"}}", separator,
                        nlohmann::json(name).dump(), file.bytes, hex(file.checksum));
    separator = ",\n";
  }
  text += "\n  },\n";
  return text + fmt::format("{}{}{}", kChecksumKey, hex(hash_bytes(text, 0)), kEnd);
}

Manifest parse_manifest(std::string_view text, const fs::path& path) {
  const auto json = detail::parse_strictly(text, path, "it");
  if (!json.is_object() || json.value("format", nlohmann::json()) != kFormat)
    broken(path, "is not the manifest of a dsv3 checkpoint");
  if (json.value("version", nlohmann::json()) != kVersion)
    broken(path, "its version is {}, this program reads version {}",
           json.contains("version") ? shown(json["version"].dump()) : "missing", kVersion);
  check_own_checksum(text, path);
  if (!json.contains("step") || !json["step"].is_number_unsigned() ||
      json["step"].get<uint64_t>() > INT64_MAX || !json.contains("files") ||
      !json["files"].is_object())
    broken(path, "lacks 'step' or 'files'");
  Manifest manifest;
  manifest.step = json["step"].get<int64_t>();
  for (const auto& [name, entry] : json["files"].items())
    manifest.files[name] = parse_file(name, entry, path);
  return manifest;
}

Manifest read_manifest(const fs::path& directory) {
  const fs::path path = directory / kManifestName;
  if (!fs::exists(path)) broken(path, "is missing");
  return parse_manifest(read_file(path), path);
}

int64_t step_of(const fs::path& checkpoint) {
  constexpr std::string_view kPrefix = "step_";
  const fs::path path = checkpoint.has_filename() ? checkpoint : checkpoint.parent_path();
  const std::string name = path.filename().string();
  if (!name.starts_with(kPrefix)) return -1;
  int64_t step = -1;
  const char* end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + kPrefix.size(), end, step);
  return error == std::errc() && stop == end && step >= 0 ? step : -1;
}

std::vector<std::string> find_damage(const fs::path& directory, Check check) {
  std::vector<std::string> damage;
  try {
    const Manifest manifest = read_manifest(directory);
    if (const int64_t step = step_of(directory); step >= 0 && step != manifest.step)
      damage.push_back(fmt::format("{}: is that of step {}, but the directory is called step_{}",
                                   kManifestName, manifest.step, step));
    for (const auto& [name, file] : manifest.files) {
      const std::string cause = damage_of(directory / name, file, check);
      if (!cause.empty()) damage.push_back(fmt::format("{}: {}", name, cause));
    }
    for (const auto& entry : fs::directory_iterator(directory)) {
      const std::string name = entry.path().filename().string();
      if (name != kManifestName && !manifest.files.contains(name))
        damage.push_back(
            fmt::format("{}: is no part of this checkpoint; move it elsewhere", shown(name)));
    }
  } catch (const IoError& error) {
    // "PATH: cause", with the directory's name cut off: the caller has said which it is.
    std::string text = error.what();
    const std::string prefix = directory.string() + "/";
    if (text.starts_with(prefix)) text.erase(0, prefix.size());
    damage.push_back(std::move(text));
  } catch (const fs::filesystem_error& error) {
    damage.push_back(fmt::format("cannot be read: {}", error.code().message()));
  }
  return damage;
}

}  // namespace dsv3
