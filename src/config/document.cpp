#include "config/document.h"

#include <fmt/format.h>

#include <algorithm>

namespace dsv3 {

std::string Place::text() const {
  const std::string& name = source ? *source : std::string("config");
  return line > 0 ? fmt::format("{}:{}:{}", name, line, column) : name;
}

bool Node::is_null() const {
  if (kind == Kind::kNull) return true;
  if (kind != Kind::kScalar || quoted) return false;
  return text.empty() || text == "~" || text == "null" || text == "Null" || text == "NULL";
}

const Node* Node::find(std::string_view name) const {
  const auto found = std::ranges::find(items, name, &Node::key);
  return is_map() && found != items.end() ? &*found : nullptr;
}

Node* Node::find(std::string_view name) {
  return const_cast<Node*>(static_cast<const Node*>(this)->find(name));
}

void Node::erase(std::string_view name) {
  if (is_map()) std::erase_if(items, [&](const Node& item) { return item.key == name; });
}

std::string Node::describe() const {
  if (is_map()) return "a map";
  if (is_sequence()) return "a list";
  if (is_null()) return "nothing";
  constexpr size_t kShown = 40;
  size_t cut = std::min(text.size(), kShown);
  while (cut > 0 && cut < text.size() && (static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80)
    --cut;
  std::string shown = text.substr(0, cut);
  std::ranges::replace_if(
      shown, [](char c) { return c == '\n' || c == '\r'; }, ' ');
  const char* more = cut < text.size() ? "…" : "";
  return quoted ? fmt::format("the string \"{}{}\"", shown, more)
                : fmt::format("{}{}", shown, more);
}

namespace detail {

size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  if (text.empty()) return 0;
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  // Overlong forms, surrogates and values beyond U+10FFFF.
  if ((lead == 0xE0 && byte(1) < 0xA0) || (lead == 0xED && byte(1) > 0x9F)) return 0;
  if ((lead == 0xF0 && byte(1) < 0x90) || (lead == 0xF4 && byte(1) > 0x8F)) return 0;
  return length;
}

Place place_of(std::string_view text, size_t offset, std::shared_ptr<const std::string> source) {
  const std::string_view before = text.substr(0, offset);
  const auto line = std::ranges::count(before, '\n') + 1;
  const size_t newline = before.rfind('\n');
  const size_t start = newline == std::string_view::npos ? 0 : newline + 1;
  return {std::move(source), static_cast<int>(line), static_cast<int>(before.size() - start) + 1};
}

bool check_text(std::string_view text, std::string_view language, const Place& start,
                Issues& issues) {
  if (text.size() > kMaxDocumentBytes) {
    issues.add(
        start, language,
        fmt::format("the text has {} bytes, at most {} are read", text.size(), kMaxDocumentBytes));
    return false;
  }
  for (size_t i = 0; i < text.size();) {
    const size_t length = utf8_length(text.substr(i));
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool control =
        (byte < 0x20 && byte != '\n' && byte != '\r' && byte != '\t') || byte == 0x7F;
    if (length == 0 || control) {
      const Place place = start.line > 0 ? place_of(text, i, start.source) : start;
      issues.add(place, language,
                 fmt::format("byte 0x{:02x} {}, expected text in UTF-8", byte,
                             control ? "is a control character" : "is not valid UTF-8"));
      return false;
    }
    i += length;
  }
  return true;
}

void insert_unique(Node& parent, Node&& child, Issues& issues) {
  if (const Node* first = parent.find(child.key)) {
    issues.add(child.key_place, child.key,
               fmt::format("the key is given twice in one map (first at {}), keep one",
                           first->key_place.text()));
    return;
  }
  if (parent.items.size() == kMaxKeys) {
    issues.add(child.key_place, child.key,
               fmt::format("the map has more than {} keys, give fewer", kMaxKeys));
  }
  if (parent.items.size() > kMaxKeys) return;
  parent.items.push_back(std::move(child));
}

}  // namespace detail
}  // namespace dsv3
