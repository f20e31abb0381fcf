#include "checkpoint/manifest.h"

#include <gtest/gtest.h>

#include <fstream>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "checkpoint/temporary_directory.h"

namespace dsv3 {
namespace {

namespace fs = std::filesystem;

/// A directory with two files and their manifest.
class ManifestTest : public testing::Test {
 protected:
  ManifestTest() {
    put("a.safetensors", std::string(300, 'x'));
    put("state.json", "{}");
    write_file_atomically(path_ / kManifestName, to_text(manifest_));
  }
  void put(const std::string& name, const std::string& content) {
    write_file_atomically(path_ / name, content);
    manifest_.files[name] = {content.size(), hash_bytes(content, 0)};
  }
  std::string damage(Check check = Check::kChecksums) {
    return fmt::format("{}", fmt::join(find_damage(path_, check), "; "));
  }
  void flip(const std::string& name, size_t at) {
    std::fstream file(path_ / name, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(at));
    const int byte = file.get();
    file.seekp(static_cast<std::streamoff>(at));
    file.put(static_cast<char>(byte ^ 1));
  }

  test::TemporaryDirectory directory_;
  fs::path path_ = directory_.path();
  Manifest manifest_{.step = 40, .files = {}};
};

TEST_F(ManifestTest, WhatWasWrittenIsReadAndWhole) {
  EXPECT_EQ(read_manifest(path_), manifest_);
  EXPECT_EQ(manifest_.total_bytes(), 302u);
  EXPECT_EQ(damage(), "");
  EXPECT_EQ(to_text(read_manifest(path_)), read_file(path_ / kManifestName));
}

TEST_F(ManifestTest, EveryFlippedBitOfEveryFileIsFound) {
  for (const char* name : {"a.safetensors", "state.json", kManifestName}) {
    const size_t size = fs::file_size(path_ / name);
    for (size_t at = 0; at < size; ++at) {
      flip(name, at);
      EXPECT_TRUE(damage().starts_with(std::string(name) + ": ")) << name << " byte " << at;
      flip(name, at);
    }
    EXPECT_EQ(damage(), "") << name;
  }
}

TEST_F(ManifestTest, EachKindOfDamageHasItsCause) {
  fs::resize_file(path_ / "a.safetensors", 299);
  EXPECT_EQ(damage(Check::kSizes),
            "a.safetensors: has 299 bytes, but the manifest says 300; it was cut");
  put("a.safetensors", std::string(300, 'x'));
  fs::remove(path_ / "state.json");
  EXPECT_EQ(damage(Check::kSizes), "state.json: is missing");
  fs::create_directory(path_ / "state.json");
  EXPECT_EQ(damage(), "state.json: is not a regular file");
  fs::remove(path_ / "state.json");
  fs::create_symlink("/etc/hostname", path_ / "state.json");
  EXPECT_EQ(damage(), "state.json: is not a regular file");
  fs::remove(path_ / "state.json");
  put("state.json", "{}");
  write_file_atomically(path_ / "notes.txt", "mine");
  EXPECT_EQ(damage(), "notes.txt: is no part of this checkpoint; move it elsewhere");
  fs::remove(path_ / "notes.txt");
  flip("a.safetensors", 7);
  EXPECT_EQ(damage(Check::kSizes), "") << "sizes alone cannot see it";
  EXPECT_NE(damage().find("a.safetensors: its checksum is "), std::string::npos);
  flip("a.safetensors", 7);
  fs::remove(path_ / kManifestName);
  EXPECT_EQ(damage(), "manifest.json: is missing");
}

TEST_F(ManifestTest, TheDirectorysNameMustBeItsStep) {
  const fs::path right = path_ / "step_40", wrong = path_ / "step_41";
  fs::create_directory(right);
  const Manifest empty{.step = 40, .files = {}};
  write_file_atomically(right / kManifestName, to_text(empty));
  EXPECT_TRUE(find_damage(right, Check::kSizes).empty());
  fs::rename(right, wrong);
  ASSERT_EQ(find_damage(wrong, Check::kSizes).size(), 1u);
  EXPECT_EQ(find_damage(wrong, Check::kSizes)[0],
            "manifest.json: is that of step 40, but the directory is called step_41");
}

TEST(Manifest, StrangersAreRefused) {
  const auto refused = [](std::string text, const std::string& part) {
    try {
      parse_manifest(text, "m");
      ADD_FAILURE() << "accepted: " << text;
    } catch (const IoError& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  /// A manifest with one change, and a checksum that fits it.
  const auto changed = [](const std::string& from, const std::string& to) {
    const Manifest manifest{.step = 3, .files = {{"a", {.bytes = 1, .checksum = 2}}}};
    std::string text = to_text(manifest);
    text.replace(text.find(from), from.size(), to);
    const size_t tail = text.find("  \"manifest_xxh3\"");
    return fmt::format("{}  \"manifest_xxh3\": \"{:016x}\"\n}}\n", text.substr(0, tail),
                       hash_bytes(std::string_view(text).substr(0, tail), 0));
  };
  EXPECT_EQ(parse_manifest(changed("\"step\": 3", "\"step\": 4"), "m").step, 4);
  refused("", "not valid JSON");
  refused("[1]", "not the manifest");
  refused("{\"format\": \"other\"}", "not the manifest");
  refused(changed("dsv3-checkpoint", "dsv3-chequepoint"), "not the manifest");
  refused(changed("\"version\": 1", "\"version\": 2"), "its version is 2, this program reads");
  refused(changed("\"step\": 3", "\"step\": -3"), "lacks 'step'");
  refused(changed("\"a\"", "\"../a\""), "'../a' is not the name of a file");
  refused(changed("\"a\"", "\"/etc/passwd\""), "is not the name of a file");
  refused(changed("\"a\"", "\"manifest.json\""), "is not the name of a file");
  refused(changed("\"bytes\": 1", "\"bytes\": -1"), "file 'a': expected");
  refused(changed("\"bytes\": 1", "\"bytes\": \"1\""), "file 'a': expected");
  refused(changed("0000000000000002", "000000000000000g"), "file 'a': expected");
  refused(changed("0000000000000002", "2"), "file 'a': expected");
  refused(to_text({.step = 1, .files = {}}) + " ", "does not end with its checksum");
  std::string again = changed("\"step\": 3,", "\"step\": 3, \"step\": 3,");
  refused(again, "names 'step' twice");
}

}  // namespace
}  // namespace dsv3
