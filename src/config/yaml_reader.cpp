#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <map>
#include <optional>
#include <sstream>

#include "config/document.h"

namespace dsv3 {
namespace {

// Memory that a document may expand to through aliases.
constexpr size_t kMaxExpandedBytes = 16 << 20;

struct Refusal {
  Place place;
  std::string message;
};

size_t weight_of(const Node& node) {
  size_t bytes = sizeof(Node) + node.text.size() + node.key.size();
  for (const Node& item : node.items) bytes += weight_of(item);
  return bytes;
}

int depth_of(const Node& node) {
  int depth = 0;
  for (const Node& item : node.items) depth = std::max(depth, depth_of(item));
  return depth + 1;
}

/// Builds our tree from the parser's events. Aliases are copied where they stand, within a budget,
/// so that a document of a few lines cannot grow without bound.
class TreeBuilder final : public YAML::EventHandler {
 public:
  TreeBuilder(std::shared_ptr<const std::string> source, int line_offset, Issues& issues)
      : source_(std::move(source)), has_lines_(line_offset > 0), issues_(issues) {}

  Node take_root() { return root_ ? std::move(*root_) : Node{}; }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    Node node;
    node.place = place(mark);
    complete(std::move(node), anchor);
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto found = anchors_.find(anchor);
    if (found == anchors_.end())
      throw Refusal{place(mark), "an alias stands inside its own anchor, write the value out"};
    spend(weight_of(found->second), mark);
    if (static_cast<int>(open_.size()) + depth_of(found->second) > kMaxDepth) too_deep(mark);
    Node copy = found->second;
    copy.place = place(mark);
    complete(std::move(copy), 0);
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    check_tag(mark, tag);
    Node node;
    node.kind = Node::Kind::kScalar;
    node.place = place(mark);
    node.text = value;
    node.quoted = tag == "!";
    complete(std::move(node), anchor);
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, Node::Kind::kSequence);
  }
  void OnSequenceEnd() override { close(); }

  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, Node::Kind::kMap);
  }
  void OnMapEnd() override { close(); }

  Place place(const YAML::Mark& mark) const {
    return has_lines_ ? Place{source_, mark.line + 1, mark.column + 1} : Place{source_, 0, 0};
  }

 private:
  struct Open {
    Node node;
    YAML::anchor_t anchor = 0;
    std::optional<std::pair<std::string, Place>> key;  // a map's key that waits for its value
  };

  static void check_tag_text(const std::string& tag, const Place& place) {
    if (!tag.empty() && tag != "?" && tag != "!")
      throw Refusal{place, fmt::format("the tag {} is not supported, write a plain value", tag)};
  }
  void check_tag(const YAML::Mark& mark, const std::string& tag) const {
    check_tag_text(tag, place(mark));
  }

  [[noreturn]] void too_deep(const YAML::Mark& mark) const {
    throw Refusal{place(mark), fmt::format("nested deeper than {} levels", kMaxDepth)};
  }

  void spend(size_t bytes, const YAML::Mark& mark) {
    spent_ += bytes;
    if (spent_ > kMaxExpandedBytes)
      throw Refusal{place(mark), fmt::format("aliases expand to more than {} MiB, write less",
                                             kMaxExpandedBytes >> 20)};
  }

  void open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
            Node::Kind kind) {
    check_tag(mark, tag);
    if (static_cast<int>(open_.size()) >= kMaxDepth) too_deep(mark);
    Open entry;
    entry.node.kind = kind;
    entry.node.place = place(mark);
    entry.anchor = anchor;
    open_.push_back(std::move(entry));
  }

  void close() {
    Open entry = std::move(open_.back());
    open_.pop_back();
    complete(std::move(entry.node), entry.anchor);
  }

  void complete(Node&& node, YAML::anchor_t anchor) {
    if (anchor != 0) {
      spent_ += weight_of(node);
      if (spent_ > kMaxExpandedBytes)
        throw Refusal{node.place, "anchored values are too large, write less"};
      anchors_[anchor] = node;
    }
    if (open_.empty()) {
      root_ = std::move(node);
      return;
    }
    Open& parent = open_.back();
    if (parent.node.is_sequence()) {
      parent.node.items.push_back(std::move(node));
    } else if (!parent.key) {
      if (!node.is_scalar())
        throw Refusal{node.place, "a key is " + node.describe() + ", expected a name"};
      parent.key.emplace(std::move(node.text), node.place);
    } else {
      node.key = std::move(parent.key->first);
      node.key_place = parent.key->second;
      parent.key.reset();
      // An empty value has no place of its own; the parser names whatever comes next.
      if (node.kind == Node::Kind::kNull) node.place = node.key_place;
      detail::insert_unique(parent.node, std::move(node), issues_);
    }
  }

  std::shared_ptr<const std::string> source_;
  bool has_lines_;
  Issues& issues_;
  std::vector<Open> open_;
  std::map<YAML::anchor_t, Node> anchors_;
  std::optional<Node> root_;
  size_t spent_ = 0;
};

}  // namespace

std::optional<Node> parse_yaml(std::string_view text, std::shared_ptr<const std::string> source,
                               Issues& issues) {
  const bool from_file = source && *source != "command line";
  const Place start{source, from_file ? 1 : 0, from_file ? 1 : 0};
  if (!detail::check_text(text, "YAML", start, issues)) return std::nullopt;
  TreeBuilder builder(source, start.line, issues);
  std::istringstream stream{std::string(text)};
  try {
    YAML::Parser parser(stream);
    parser.HandleNextDocument(builder);
    Node root = builder.take_root();
    if (!root.place.source) root.place = start;
    TreeBuilder second(source, start.line, issues);
    if (!parser.HandleNextDocument(second)) return root;
    issues.add(second.take_root().place, "YAML", "a second document, expected one document");
  } catch (const Refusal& refusal) {
    issues.add(refusal.place, "YAML", refusal.message);
  } catch (const YAML::Exception& error) {
    const bool known = error.mark.line >= 0 && error.mark.column >= 0;
    issues.add(known ? builder.place(error.mark) : start, "YAML", "syntax error: " + error.msg);
  }
  return std::nullopt;
}

}  // namespace dsv3
