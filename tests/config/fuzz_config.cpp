// Mutates the shipped YAML and JSON configs and reads them: nothing may crash, every refusal names
// file, line, column and key, and every config that loads prints back to itself.
// Usage: config_fuzz [COUNT [SEED]]; meant to run under asan and ubsan.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "config/load.h"
#include "config/schema.h"

namespace dsv3 {
namespace {

class Mutator {
 public:
  Mutator(std::vector<std::string> corpus, uint64_t seed)
      : corpus_(std::move(corpus)), random_(seed) {}

  std::string next() {
    std::string text = corpus_[pick(corpus_.size())];
    for (size_t i = pick(3) == 0 ? 1 + pick(12) : 1; i > 0; --i) mutate(text);
    return text;
  }

  size_t pick(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random_); }

  std::string value() {
    static const char* kValues[] = {"0",
                                    "-1",
                                    "1e400",
                                    ".nan",
                                    ".inf",
                                    "99999999999999999999",
                                    "null",
                                    "~",
                                    "true",
                                    "auto",
                                    "\"x\"",
                                    "'",
                                    "[]",
                                    "{}",
                                    "[1, 2]",
                                    "{a: b}",
                                    "1e15",
                                    "3",
                                    "7",
                                    "&a",
                                    "*a",
                                    "!!str",
                                    "|",
                                    ">",
                                    "-",
                                    "1.5",
                                    "0.1",
                                    "9007199254740993",
                                    "-0",
                                    "1e-320",
                                    "{type: wsd, peak: 1, "
                                    "decay_steps: 3}",
                                    "[{value: 1, tokens: 1e15}, {value: 2, steps: 9}]",
                                    "[{from: 1, to: 9, steps: 100000}, {value: 9, tokens: 5}]"};
    return kValues[pick(std::size(kValues))];
  }

 private:
  void mutate(std::string& text) {
    const size_t at = text.empty() ? 0 : pick(text.size());
    const size_t length = std::min(text.size() - at, 1 + pick(pick(8) == 0 ? 200 : 12));
    switch (pick(14)) {
      case 0:
        if (!text.empty()) text[at] = static_cast<char>(pick(256));
        break;
      case 1:
        text.erase(at, length);
        break;
      case 2:
        text.insert(pick(text.size() + 1), text.substr(at, length));
        break;
      case 3:
        text.insert(at, 1, "{}[]:,\"'#&*!|>-?%@ \n\t\\"[pick(22)]);
        break;
      case 6: {  // a piece of another file
        const std::string& other = corpus_[pick(corpus_.size())];
        const size_t from = other.empty() ? 0 : pick(other.size());
        text.insert(at, other.substr(from, 1 + pick(200)));
        break;
      }
      case 7: {  // a key of ours, in some place
        const Field& field = schema()[pick(schema().size())];
        const std::string name(field.key.substr(field.key.rfind('.') + 1));
        text.insert(at, fmt::format("{}{}: {}\n", pick(2) ? "\n  " : "", name, value()));
        break;
      }
      case 8:
        text.insert(at, std::string(1 + pick(60), "[{ \n&"[pick(5)]));
        break;
      default:
        replace_value(text, at);
    }
  }

  void replace_value(std::string& text, size_t at) {
    const size_t colon = text.find(": ", at);
    if (colon == std::string::npos) return;
    const size_t end = text.find_first_of(",}\n", colon + 2);
    text.replace(colon + 2, (end == std::string::npos ? text.size() : end) - colon - 2, value());
  }

  std::vector<std::string> corpus_;
  std::mt19937_64 random_;
};

bool take_number(std::string_view& text) {
  const size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
  text.remove_prefix(digits);
  return digits > 0;
}

bool take(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

/// Whether `line` reads "FILE:LINE:COLUMN: key: message" or "command line: key: message", on one
/// line.
bool has_place_and_key(std::string_view line) {
  if (line.find_first_of("\r\n") != std::string_view::npos) return false;
  if (take(line, "fuzz.yaml:") || take(line, "fuzz.json:")) {
    if (!take_number(line) || !take(line, ":") || !take_number(line) || !take(line, ": "))
      return false;
  } else if (!take(line, "command line: ")) {
    return false;
  }
  const size_t colon = line.find(": ");
  return colon != std::string_view::npos && colon > 0 && line.front() != ' ' &&
         colon + 2 < line.size();
}

/// Empty when the outcome is right, otherwise what is wrong with it.
std::string judge(const std::string& yaml, const std::string& json,
                  const std::vector<std::string>& overrides, size_t& refused) {
  try {
    std::optional<DeepSpeedText> deepspeed;
    if (!json.empty()) deepspeed = {json, "fuzz.json"};
    const Config config = load_config_text(yaml, "fuzz.yaml", overrides, deepspeed);
    validate(config);
    const Config again = load_config_text(to_yaml(config), "printed.yaml");
    return again == config ? "" : "does not print back to itself:\n" + to_yaml(config);
  } catch (const ConfigErrors& error) {
    ++refused;
    for (const std::string& line : error.errors) {
      if (!has_place_and_key(line)) return "an error without place or key: " + line;
    }
    return error.errors.empty() ? "refused without a reason" : "";
  } catch (const std::exception& error) {
    return std::string("an exception of another kind: ") + error.what();
  }
}

int fuzz(size_t count, uint64_t seed) {
  std::vector<std::string> yamls, jsons;
  std::vector<std::filesystem::path> paths;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::filesystem::path(DSV3_SOURCE_DIR) / "configs"))
    paths.push_back(entry.path());
  std::ranges::sort(paths);
  for (const auto& path : paths) {
    if (path.extension() == ".yaml") {
      yamls.push_back(read_file(path));
      yamls.push_back(to_yaml(load_config(path)));
    }
    if (path.extension() == ".json") jsons.push_back(read_file(path));
  }
  Mutator yaml(yamls, seed), json(jsons, seed + 1);
  size_t refused = 0;
  for (size_t i = 0; i < count; ++i) {
    const bool use_json = i % 3 == 0;
    std::vector<std::string> overrides;
    if (i % 7 == 0) {
      const Field& field = schema()[yaml.pick(schema().size())];
      overrides.push_back(fmt::format("{}={}", field.key, yaml.value()));
    }
    const std::string text = use_json && i % 2 == 0 ? yamls[i % yamls.size()] : yaml.next();
    const std::string other = use_json ? json.next() : "";
    const std::string wrong = judge(text, other, overrides, refused);
    if (wrong.empty()) continue;
    fmt::print(
        "mutation {} of seed {}: {}\n--- yaml ---\n{}\n--- json ---\n{}\n--- override ---\n{}\n", i,
        seed, wrong, text, other, overrides.empty() ? "" : overrides.front());
    return 1;
  }
  fmt::print(
      "{} mutated configs, seed {}: {} refused with place and key, {} loaded and printed back\n",
      count, seed, refused, count - refused);
  return refused > 0 && refused < count ? 0 : 1;
}

}  // namespace
}  // namespace dsv3

int main(int argc, char** argv) {
  const size_t count = argc > 1 ? std::stoul(argv[1]) : 10000;
  const uint64_t seed = argc > 2 ? std::stoull(argv[2]) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  return dsv3::fuzz(count, seed);
}
