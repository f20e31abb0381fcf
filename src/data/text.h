#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "data/compressed_input.h"

namespace dsv3 {

/// How a text file falls into documents. Lines keep their newline, so that the documents of a file,
/// put together, are the file (without its blank lines for kLine and kBlank).
enum class DocumentSplit : uint8_t {
  kFile,   // the whole file is one document
  kLine,   // each line that is not blank
  kBlank,  // each run of lines between blank lines
};

/// "file", "line" or "blank" (data.document_split); std::invalid_argument otherwise.
DocumentSplit document_split_from_string(std::string_view text);

struct TextOptions {
  DocumentSplit split = DocumentSplit::kFile;  // of plain text; a line of JSONL is a document
  std::string jsonl_field = "text";            // the string that is a JSONL line's document
};

/// Whether a file is read as JSON lines: .jsonl or .ndjson, also followed by .gz or .zst.
bool is_jsonl(const std::filesystem::path& path);

/// Reads the documents of one text or JSONL file in order. Plain, gzip and zstd files are told
/// apart by their first bytes. Errors name the file, and for JSONL the line: IoError where the file
/// cannot be read or its compression is broken or cut short, std::invalid_argument where a line is
/// not what JSONL should be.
class TextReader {
 public:
  TextReader(std::filesystem::path path, TextOptions options);

  /// Puts the next document into `document`; false at the end of the file. May give empty ones.
  bool next(std::string& document);
  /// Bytes of the file, as it lies on disk, that have been read.
  int64_t input_read() const { return input_.input_read(); }
  /// Lines read so far.
  int64_t line() const { return line_; }

 private:
  bool next_line(std::string& line);
  bool next_json(std::string& document);

  std::filesystem::path path_;
  TextOptions options_;
  bool jsonl_;
  CompressedInput input_;
  std::string buffer_, scratch_;
  size_t at_ = 0;
  bool ended_ = false;
  int64_t line_ = 0;
};

}  // namespace dsv3
