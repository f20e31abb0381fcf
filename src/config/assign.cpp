#include "config/assign.h"

#include <fmt/format.h>

#include "config/schema.h"

namespace dsv3 {
namespace {

constexpr size_t kMaxPathParts = 16;

std::vector<std::string_view> split(std::string_view path) {
  std::vector<std::string_view> parts;
  for (size_t dot = 0; (dot = path.find('.')) != std::string_view::npos;
       path.remove_prefix(dot + 1))
    parts.push_back(path.substr(0, dot));
  parts.push_back(path);
  return parts;
}

void remove_path(Node& root, std::string_view path) {
  Node* node = &root;
  const auto parts = split(path);
  for (size_t i = 0; node != nullptr && i + 1 < parts.size(); ++i) node = node->find(parts[i]);
  if (node != nullptr) node->erase(parts.back());
}

}  // namespace

Node scalar_node(std::string text, const Place& place, std::string label) {
  Node node;
  node.kind = Node::Kind::kScalar;
  node.place = place;
  node.text = std::move(text);
  node.label = std::move(label);
  return node;
}

Node map_node(const Place& place, std::string label) {
  Node node;
  node.kind = Node::Kind::kMap;
  node.place = place;
  node.label = std::move(label);
  return node;
}

void put(Node& map, std::string_view key, Node value) {
  value.key = key;
  value.key_place = value.place;
  map.items.push_back(std::move(value));
}

void assign(Node& root, std::string_view path, Node value, Issues& issues) {
  if (value.is_map() && is_section(path)) {
    for (Node& item : value.items) {
      const std::string inner = fmt::format("{}.{}", path, item.key);
      assign(root, inner, std::move(item), issues);
    }
    return;
  }
  std::string_view canonical = path;
  if (const Field* field = find_field(path)) {
    canonical = field->key;
    for (const std::string_view alias : field->aliases) remove_path(root, alias);
  }
  const auto parts = split(canonical);
  if (parts.size() > kMaxPathParts) {
    issues.add(value.place, path.substr(0, 80), "unknown key, it has too many parts");
    return;
  }
  Node* node = &root;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (node->is_null()) {
      node->kind = Node::Kind::kMap;
      node->text.clear();
      if (!node->place.source) node->place = value.place;
    }
    if (!node->is_map()) {
      issues.add(value.place, path,
                 fmt::format("cannot be set, because {} holds {} and not a map",
                             i == 0 ? "the file" : parts[i - 1], node->describe()));
      return;
    }
    Node* next = node->find(parts[i]);
    if (next == nullptr) {
      Node made;
      made.place = value.place;
      put(*node, parts[i], std::move(made));
      next = &node->items.back();
    }
    node = next;
  }
  const std::string key = std::move(node->key);
  *node = std::move(value);
  node->key = key;
  node->key_place = node->place;
}

void apply_override(Node& root, std::string_view text, Issues& issues) {
  static const auto kSource = std::make_shared<const std::string>("command line");
  const Place place{kSource, 0, 0};
  const size_t equal = text.find('=');
  const std::string_view path = text.substr(0, equal);
  if (equal == std::string_view::npos || path.empty()) {
    issues.add(place, path.empty() ? text : path, "expected key.path=value");
    return;
  }
  const std::string_view value = text.substr(equal + 1);
  const Field* field = find_field(path);
  Config any;
  const bool takes_text =
      path == "deepspeed" || (field != nullptr && field->choices.empty() &&
                              std::holds_alternative<std::string*>(field->slot(any)));
  Issues inner;
  auto node = parse_yaml(value, kSource, inner);
  if (takes_text && detail::check_text(value, path, place, issues) &&
      (!node || !inner.empty() || !(node->is_scalar() || node->is_null()))) {
    Node literal = scalar_node(std::string(value), place);
    literal.quoted = true;
    node = std::move(literal);
    inner.list.clear();
  }
  for (Issue& issue : inner.list)
    issues.add(place, path, fmt::format("the value is no YAML: {}", issue.message));
  if (node && inner.empty()) {
    node->place = place;
    assign(root, path, std::move(*node), issues);
  }
}

}  // namespace dsv3
