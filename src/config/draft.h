#pragma once

#include <map>
#include <set>
#include <string>
#include <string_view>

#include "config/document.h"
#include "config/values.h"

namespace dsv3 {

/// A config while it is read: values so far, and where each was written.
class Draft {
 public:
  /// Reads a tree over the values so far; what a preset gives has no place to report.
  void read(const Node& root, bool is_preset, Issues& issues);
  /// Reads the schedules that the trees gave; after all trees, because some last training.steps.
  void read_schedules(Issues& issues);

  /// Whether the user, or a preset, gave the key.
  bool is_given(std::string_view key) const {
    return written_.contains(key) || preset_.contains(key);
  }
  bool is_written(std::string_view key) const { return written_.contains(key); }
  bool has_failed(std::string_view key) const { return failed_.contains(key); }
  void mark_failed(std::string_view key) { failed_.insert(std::string(key)); }

  /// Place and name for a complaint about `keys`: the first that the user wrote, or its section.
  Issue blame(std::span<const std::string_view> keys, std::string message) const;

  /// Which pieces of the schedule `key` were written with the count at which they end.
  const std::vector<bool>* absolute_ends(std::string_view key) const;

  Config config;

 private:
  struct Written {
    Place place;
    std::string name;  // as the user wrote it, which may be an alias
  };

  void read_map(const Node& node, const std::string& section, bool is_preset, Issues& issues);
  void read_field(const Node& node, const std::string& path, const Field& field, bool is_preset,
                  Issues& issues);

  std::map<std::string, Written, std::less<>> written_;
  std::map<std::string, Place, std::less<>> sections_;
  std::set<std::string, std::less<>> preset_, failed_;
  std::map<std::string, Node, std::less<>> schedule_nodes_;
  std::map<std::string, std::vector<bool>, std::less<>> absolute_;
  Place root_;
};

/// Fills in what follows from other keys: zeros that stand for a derived width, defaults that
/// depend on others, and the pieces of schedules that mix steps and tokens.
void resolve(Draft& draft, Issues& issues);

/// One broken rule between keys; the message holds the equation.
struct BrokenRule {
  std::vector<std::string_view> keys;
  std::string message;
};

/// The rules between keys that `config` breaks. Its fields are in their ranges.
std::vector<BrokenRule> broken_rules(const Config& config);

}  // namespace dsv3
