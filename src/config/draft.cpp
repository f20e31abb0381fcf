#include "config/draft.h"

#include <fmt/format.h>

namespace dsv3 {

void Draft::read(const Node& root, bool is_preset, Issues& issues) {
  if (!is_preset) root_ = root.place;
  if (root.is_null()) return;
  if (!root.is_map()) {
    issues.add(root.place, "YAML",
               fmt::format("expected a map of sections (model, data, training, …), got {}",
                           root.describe()));
    return;
  }
  read_map(root, "", is_preset, issues);
}

void Draft::read_map(const Node& node, const std::string& section, bool is_preset, Issues& issues) {
  for (const Node& item : node.items) {
    const std::string path = section.empty() ? item.key : fmt::format("{}.{}", section, item.key);
    if (const Field* field = find_field(path)) {
      read_field(item, path, *field, is_preset, issues);
    } else if (is_section(path)) {
      if (!is_preset) sections_.emplace(path, item.key_place);
      if (item.is_map()) {
        read_map(item, path, is_preset, issues);
      } else if (!item.is_null()) {
        issues.add(item.place, path,
                   fmt::format("is a section, expected a map of keys, got {}", item.describe()));
      }
    } else {
      issues.add(item.key_place, path.size() <= 200 ? path : path.substr(0, 200),
                 fmt::format("unknown key, {}", suggest_key(path)));
    }
  }
}

void Draft::read_field(const Node& node, const std::string& path, const Field& field,
                       bool is_preset, Issues& issues) {
  const std::string key(field.key);
  if (is_preset) {
    preset_.insert(key);
  } else if (const auto [first, fresh] = written_.emplace(key, Written{node.key_place, path});
             !fresh) {
    issues.add(node.key_place, path,
               fmt::format("is the same as {}, given at {}; keep one", first->second.name,
                           first->second.place.text()));
    return;
  }
  if (std::holds_alternative<Schedule*>(field.slot(config))) {
    schedule_nodes_[key] = node;
  } else if (!read_value(node, path, field, config, issues)) {
    failed_.insert(key);
  }
}

void Draft::read_schedules(Issues& issues) {
  const ReadContext context{issues, config.training.steps};
  for (const auto& [key, node] : schedule_nodes_) {
    const Field& field = *find_field(key);
    if (auto written = read_schedule(node, key, field.range, context)) {
      *std::get<Schedule*>(field.slot(config)) = std::move(written->schedule);
      absolute_[key] = std::move(written->absolute);
    } else {
      failed_.insert(key);
    }
  }
  schedule_nodes_.clear();
}

Issue Draft::blame(std::span<const std::string_view> keys, std::string message) const {
  for (const std::string_view key : keys) {
    if (const auto found = written_.find(key); found != written_.end())
      return {found->second.place, found->second.name, std::move(message)};
  }
  std::string_view section = keys.front();
  while (section.find('.') != std::string_view::npos) {
    section = section.substr(0, section.rfind('.'));
    if (const auto found = sections_.find(section); found != sections_.end())
      return {found->second, std::string(keys.front()), std::move(message)};
  }
  return {root_, std::string(keys.front()), std::move(message)};
}

const std::vector<bool>* Draft::absolute_ends(std::string_view key) const {
  const auto found = absolute_.find(key);
  return found == absolute_.end() ? nullptr : &found->second;
}

}  // namespace dsv3
