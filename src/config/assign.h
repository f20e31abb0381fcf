#pragma once

#include <string>
#include <string_view>

#include "config/document.h"

namespace dsv3 {

/// Sets `path` in the tree `root` to `value`, whose place the new entries take. Aliases of the same
/// key are removed; a map for a section is merged key by key; sections are made where missing.
/// An issue when something on the way is not a map.
void assign(Node& root, std::string_view path, Node value, Issues& issues);

/// Applies `key.path=value` from the command line; the value is read as YAML (a text that is not
/// YAML stands for itself).
void apply_override(Node& root, std::string_view text, Issues& issues);

/// Nodes for values that we make ourselves.
Node scalar_node(std::string text, const Place& place, std::string label = {});
Node map_node(const Place& place, std::string label = {});
/// Adds an entry to a map that we make ourselves.
void put(Node& map, std::string_view key, Node value);

}  // namespace dsv3
