#include <fmt/format.h>

#include <iterator>
#include <nlohmann/json.hpp>

#include "config/document.h"

namespace dsv3 {
namespace {

/// Reads characters and tells how far the parser has come; copies share the counter.
struct CountingIterator {
  using iterator_category = std::forward_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  const char* at = nullptr;
  const char** furthest = nullptr;

  reference operator*() const { return *at; }
  CountingIterator& operator++() {
    *furthest = ++at;
    return *this;
  }
  CountingIterator operator++(int) {
    CountingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const CountingIterator& other) const { return at == other.at; }
};

/// Builds our tree from nlohmann's SAX events. Places come from the parser's position just after
/// each token, walked back to the token's first character.
class JsonBuilder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  JsonBuilder(std::string_view text, std::shared_ptr<const std::string> source, Issues& issues)
      : text_(text), source_(std::move(source)), issues_(issues), furthest_(text.data()) {}

  CountingIterator begin() { return {text_.data(), &furthest_}; }
  CountingIterator end() { return {text_.data() + text_.size(), &furthest_}; }
  Node take_root() { return std::move(root_); }

  bool null() override { return scalar("null", false, word_start()); }
  bool boolean(bool value) override {
    return scalar(value ? "true" : "false", false, word_start());
  }
  bool number_integer(number_integer_t) override { return number(); }
  bool number_unsigned(number_unsigned_t) override { return number(); }
  bool number_float(number_float_t, const string_t&) override { return number(); }
  bool string(string_t& value) override { return scalar(value, true, string_start()); }
  bool binary(binary_t&) override { return false; }

  bool start_object(std::size_t) override { return open(Node::Kind::kMap); }
  bool start_array(std::size_t) override { return open(Node::Kind::kSequence); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& value) override {
    open_.back().key = value;
    open_.back().key_place = place(string_start());
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    const std::string_view what = error.what();
    const size_t colon = what.find(": ");
    const size_t offset = std::min(position > 0 ? position - 1 : 0, text_.size());
    issues_.add(
        place(offset), "JSON",
        fmt::format("syntax error{}", colon == std::string_view::npos ? what : what.substr(colon)));
    return false;
  }

 private:
  struct Open {
    Node node;
    std::string key;
    Place key_place;
  };

  // Tokens come in the order of the text, so lines are counted on from the last token.
  Place place(size_t offset) const {
    if (offset < counted_) return detail::place_of(text_, offset, source_);
    for (; counted_ < offset; ++counted_) {
      if (text_[counted_] != '\n') continue;
      ++line_;
      line_start_ = counted_ + 1;
    }
    return {source_, line_, static_cast<int>(offset - line_start_) + 1};
  }
  size_t position() const { return static_cast<size_t>(furthest_ - text_.data()); }

  // The first character of the number or literal that ends at or before the parser's position (the
  // parser reads one character past a number).
  size_t word_start() const {
    const auto in_word = [&](size_t i) {
      const auto c = static_cast<unsigned char>(text_[i]);
      return std::isalnum(c) != 0 || c == '.' || c == '+' || c == '-';
    };
    size_t i = position();
    while (i > 0 && !in_word(i - 1)) --i;
    word_end_ = i;
    while (i > 0 && in_word(i - 1)) --i;
    return i;
  }

  // The opening quote of the string whose closing quote the parser has just read.
  size_t string_start() const {
    size_t i = position() - 1;
    while (i > 0) {
      --i;
      if (text_[i] != '"') continue;
      size_t slashes = 0;
      while (slashes < i && text_[i - 1 - slashes] == '\\') ++slashes;
      if (slashes % 2 == 0) break;
    }
    return i;
  }

  bool number() {
    const size_t start = word_start();
    return scalar(std::string(text_.substr(start, word_end_ - start)), false, start);
  }

  bool scalar(std::string value, bool quoted, size_t start) {
    Node node;
    node.kind = Node::Kind::kScalar;
    node.place = place(start);
    node.text = std::move(value);
    node.quoted = quoted;
    return complete(std::move(node));
  }

  bool open(Node::Kind kind) {
    Open entry;
    entry.node.kind = kind;
    entry.node.place = place(position() - 1);
    if (static_cast<int>(open_.size()) >= kMaxDepth) {
      issues_.add(entry.node.place, "JSON", fmt::format("nested deeper than {} levels", kMaxDepth));
      return false;
    }
    open_.push_back(std::move(entry));
    return true;
  }

  bool close() {
    Node node = std::move(open_.back().node);
    open_.pop_back();
    return complete(std::move(node));
  }

  bool complete(Node&& node) {
    if (open_.empty()) {
      root_ = std::move(node);
      return true;
    }
    Open& parent = open_.back();
    if (parent.node.is_map()) {
      node.key = parent.key;
      node.key_place = parent.key_place;
      detail::insert_unique(parent.node, std::move(node), issues_);
    } else {
      parent.node.items.push_back(std::move(node));
    }
    return true;
  }

  std::string_view text_;
  std::shared_ptr<const std::string> source_;
  Issues& issues_;
  const char* furthest_;
  mutable size_t word_end_ = 0;
  mutable size_t counted_ = 0, line_start_ = 0;
  mutable int line_ = 1;
  std::vector<Open> open_;
  Node root_;
};

}  // namespace

std::optional<Node> parse_json(std::string_view text, std::shared_ptr<const std::string> source,
                               Issues& issues) {
  const Place start{source, 1, 1};
  if (!detail::check_text(text, "JSON", start, issues)) return std::nullopt;
  JsonBuilder builder(text, source, issues);
  const bool whole = nlohmann::json::sax_parse(builder.begin(), builder.end(), &builder);
  return whole ? std::optional(builder.take_root()) : std::nullopt;
}

}  // namespace dsv3
