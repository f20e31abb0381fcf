#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace dsv3 {

/// Where a value was written: a file with line and column from 1, or the command line (line 0).
struct Place {
  std::shared_ptr<const std::string> source;
  int line = 0;
  int column = 0;

  /// "FILE:LINE:COLUMN", or the source's name alone when there is no line.
  std::string text() const;
};

/// One value of a YAML or JSON document with its place. A map's values stand in `items` under their
/// `key`, in the order of the text; keys of one map are distinct.
struct Node {
  enum class Kind { kNull, kScalar, kSequence, kMap };

  Kind kind = Kind::kNull;
  Place place;             // of the value
  std::string text;        // of a scalar
  bool quoted = false;     // the scalar was written as a string
  std::string key;         // inside a map
  Place key_place;         // inside a map
  std::string label = {};  // name to use in errors; empty = the path of keys
  std::vector<Node> items;

  bool is_map() const { return kind == Kind::kMap; }
  bool is_sequence() const { return kind == Kind::kSequence; }
  bool is_scalar() const { return kind == Kind::kScalar; }
  /// Empty, `~` or `null`, unquoted.
  bool is_null() const;
  const Node* find(std::string_view name) const;
  Node* find(std::string_view name);
  /// Removes the entry `name` of a map, if there is one.
  void erase(std::string_view name);
  /// "a map", "a list", "nothing" or "the string/value …" (shortened), for messages.
  std::string describe() const;
};

/// One thing wrong with a config.
struct Issue {
  Place place;
  std::string key;  // full path of the key, or the construct ("YAML", "JSON")
  std::string message;
};

/// Collects what is wrong, so that all of it is reported at once.
struct Issues {
  std::vector<Issue> list;

  void add(const Place& place, std::string_view key, std::string message) {
    list.push_back({place, std::string(key), std::move(message)});
  }
  bool empty() const { return list.empty(); }
};

/// Limits of a document, far above any real config and far below what could hurt.
inline constexpr size_t kMaxDocumentBytes = 256 << 10;
inline constexpr size_t kMaxKeys = 1000;  // of one map
inline constexpr int kMaxDepth = 32;

/// The document as a tree; an empty document is a null node. Syntax errors, a second document,
/// aliases that expand beyond the limits and nesting beyond kMaxDepth are added to `issues`, and
/// there is no tree. Repeated keys are added too; the tree then holds the first of them.
std::optional<Node> parse_yaml(std::string_view text, std::shared_ptr<const std::string> source,
                               Issues& issues);

/// The same from JSON.
std::optional<Node> parse_json(std::string_view text, std::shared_ptr<const std::string> source,
                               Issues& issues);

namespace detail {

/// False, with an issue, when the text is too long, is not UTF-8 or holds control characters.
bool check_text(std::string_view text, std::string_view language, const Place& start,
                Issues& issues);
/// Line and column of byte `offset`, both from 1; the column counts bytes.
Place place_of(std::string_view text, size_t offset, std::shared_ptr<const std::string> source);
/// Adds `child` to the map `parent`, or an issue when its key is already there or the map is full.
void insert_unique(Node& parent, Node&& child, Issues& issues);
/// Length in bytes of the UTF-8 character at the start of `text`, or 0 when it is not valid.
size_t utf8_length(std::string_view text);

}  // namespace detail

}  // namespace dsv3
