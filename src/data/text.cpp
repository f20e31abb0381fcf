#include "data/text.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"

namespace dsv3 {
namespace {

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r\n\v\f") == std::string_view::npos;
}

/// nlohmann's message without its "[json.exception…]" head.
std::string json_reason(const std::exception& error) {
  const std::string what = error.what();
  const size_t head = what.find("] ");
  return head == std::string::npos ? what : what.substr(head + 2);
}

}  // namespace

DocumentSplit document_split_from_string(std::string_view text) {
  if (text == "file") return DocumentSplit::kFile;
  if (text == "line") return DocumentSplit::kLine;
  if (text == "blank") return DocumentSplit::kBlank;
  invalid("document_split: '{}' is not one of file, line, blank", text);
}

bool is_jsonl(const std::filesystem::path& path) {
  std::filesystem::path name = path.filename();
  if (name.extension() == ".gz" || name.extension() == ".zst") name = name.stem();
  return name.extension() == ".jsonl" || name.extension() == ".ndjson";
}

TextReader::TextReader(std::filesystem::path path, TextOptions options)
    : path_(std::move(path)),
      options_(std::move(options)),
      jsonl_(is_jsonl(path_)),
      input_(path_) {}

bool TextReader::next_line(std::string& line) {
  size_t searched = at_;
  for (;;) {
    const size_t end = buffer_.find('\n', searched);
    if (end != std::string::npos) {
      line.assign(buffer_, at_, end + 1 - at_);
      at_ = end + 1;
      break;
    }
    searched = buffer_.size();
    if (ended_) {
      if (at_ == buffer_.size()) return false;
      line.assign(buffer_, at_);
      at_ = buffer_.size();
      break;
    }
    buffer_.erase(0, at_);
    searched -= std::exchange(at_, 0);
    ended_ = !input_.read(buffer_);
  }
  ++line_;
  return true;
}

bool TextReader::next_json(std::string& document) {
  do {
    if (!next_line(scratch_)) return false;
  } while (is_blank(scratch_));
  const auto fail = [&](const std::string& what) {
    invalid("{}:{}: {}", path_.string(), line_, what);
  };
  nlohmann::json value;
  try {
    value = nlohmann::json::parse(scratch_);
  } catch (const nlohmann::json::exception& error) {
    fail("not JSON: " + json_reason(error));
  }
  if (!value.is_object())
    fail(fmt::format("expected an object with a field \"{}\", got {}", options_.jsonl_field,
                     value.type_name()));
  const auto field = value.find(options_.jsonl_field);
  if (field == value.end())
    fail(fmt::format("the object has no field \"{}\"", options_.jsonl_field));
  if (!field->is_string())
    fail(fmt::format("field \"{}\": expected a string, got {}", options_.jsonl_field,
                     field->type_name()));
  document = field->get<std::string>();
  return true;
}

bool TextReader::next(std::string& document) {
  document.clear();
  if (jsonl_) return next_json(document);
  if (options_.split == DocumentSplit::kFile) {
    if (ended_) return false;
    while (input_.read(document)) {
    }
    return ended_ = true;
  }
  if (options_.split == DocumentSplit::kLine) {
    do {
      if (!next_line(document)) return false;
    } while (is_blank(document));
    return true;
  }
  while (next_line(scratch_)) {
    if (!is_blank(scratch_)) {
      document += scratch_;
    } else if (!document.empty()) {
      return true;
    }
  }
  return !document.empty();
}

}  // namespace dsv3
