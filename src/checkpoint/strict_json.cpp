#include "checkpoint/strict_json.h"

#include <set>
#include <vector>

namespace dsv3::detail {

using Json = nlohmann::json;

std::string shown(std::string_view name) {
  std::string result(name.substr(0, 120));
  for (char& c : result) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  if (name.size() > result.size()) result += "…";
  return result;
}

bool is_file_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos;
}

Json parse_strictly(std::string_view text, const std::filesystem::path& path, const char* what) {
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > 8) broken(path, "{} is nested too deeply", what);
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) {
        broken(path, "{} names '{}' twice", what, shown(key));
      }
    }
    return true;
  };
  try {
    return Json::parse(text, check);
  } catch (const Json::exception& error) {
    broken(path, "{} is not valid JSON ({})", what, shown(error.what()));
  }
}

}  // namespace dsv3::detail
