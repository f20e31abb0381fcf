#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/progress_bar.h"
#include "data/megatron.h"
#include "data/shard.h"
#include "data/sources.h"
#include "data/tokenize.h"

namespace dsv3::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kTokenizeExamples = R"(Examples:
  dsv3 data tokenize data/kjv.txt --out data/kjv.tokens --document-split line
  dsv3 data tokenize crawl/*.jsonl.zst --out crawl.tokens --jsonl-field content --workers 8
Files may be text or JSON lines (.jsonl, .ndjson), plain, gzip or zstd. A pattern in quotes is expanded too.)";

constexpr const char* kInspectExamples = R"(Examples:
  dsv3 data inspect data/kjv.tokens               counts, and the first documents as text
  dsv3 data inspect corpus_text_document          a Megatron pair: corpus_text_document.bin and .idx
  dsv3 data inspect data/kjv.tokens --samples 0 --verify)";

struct TokenizeArguments {
  std::vector<std::string> files;
  std::string out, tokenizer = "bytes", document_split = "file", jsonl_field = "text";
  int64_t workers = 0;
};

struct InspectArguments {
  std::string path, tokenizer = "bytes";
  int64_t samples = 3;
  int64_t length = 200;  // tokens of each
  bool verify = false;
};

std::string human_bytes(double bytes) {
  const char* const units[] = {"B", "KB", "MB", "GB", "TB"};
  size_t unit = 0;
  for (; bytes >= 1000 && unit + 1 < std::size(units); ++unit) bytes /= 1000;
  return fmt::format("{:.{}f} {}", bytes, unit == 0 ? 0 : 1, units[unit]);
}

/// 1234567 → "1,234,567".
std::string grouped(int64_t number) {
  std::string digits = std::to_string(number);
  for (auto at = static_cast<int64_t>(digits.size()) - 3; at > 0; at -= 3)
    digits.insert(static_cast<size_t>(at), ",");
  return digits;
}

void show(ProgressBar& bar, const TokenizeProgress& progress) {
  const double done = progress.input_bytes > 0 ? static_cast<double>(progress.input_read) /
                                                     static_cast<double>(progress.input_bytes)
                                               : 1.0;
  const double speed = static_cast<double>(progress.text_bytes) / std::max(bar.seconds(), 1e-3);
  bar.show(done, fmt::format("{}/{} files  {} documents  {} tokens  {}/s", progress.files_done,
                             progress.num_files, grouped(progress.num_documents),
                             grouped(progress.num_tokens), human_bytes(speed)));
}

void tokenize(const TokenizeArguments& arguments) {
  const TextOptions options{.split = document_split_from_string(arguments.document_split),
                            .jsonl_field = arguments.jsonl_field};
  const auto tokenizer = make_tokenizer(arguments.tokenizer);
  std::vector<fs::path> files;
  for (const auto& pattern : arguments.files)
    for (const auto& file : expand_source(pattern)) {
      if (!fs::exists(file)) throw IoError(fmt::format("{} does not exist", file.string()));
      if (fs::is_directory(file))
        throw IoError(fmt::format("{} is a directory; name its files", file.string()));
      require(!TokenShard::is_shard(file), "{} is a token shard already", file.string());
      require(!fs::exists(arguments.out) || !fs::equivalent(file, arguments.out),
              "--out {} is one of the files to read", arguments.out);
      files.push_back(file);
    }
  const int64_t workers = arguments.workers > 0
                              ? arguments.workers
                              : std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 64);
  TokenizeProgress counts;
  double seconds = 0;
  {
    ProgressBar bar("tokenize");
    counts = tokenize_to_shard(files, options, *tokenizer, workers, arguments.out,
                               [&](const TokenizeProgress& progress) { show(bar, progress); });
    seconds = bar.seconds();
  }
  fmt::print("{}: {} documents, {} tokens from {} of text in {} file{}, {} on disk, {:.1f} s\n",
             arguments.out, grouped(counts.num_documents), grouped(counts.num_tokens),
             human_bytes(static_cast<double>(counts.text_bytes)), counts.num_files,
             counts.num_files == 1 ? "" : "s",
             human_bytes(static_cast<double>(fs::file_size(arguments.out))), seconds);
  if (counts.num_documents == 0)
    fmt::print(stderr, "warning: the files hold no text, so the shard is empty\n");
}

/// Printable text on one line: control characters and the backslash escaped.
std::string one_line(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<uint8_t>(c);
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (c == '\\') {
      out += "\\\\";
    } else if (byte < 0x20 || byte == 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out += c;
    }
  }
  return out;
}

/// The first tokens of a document as text, with ids that are no text in angle brackets.
std::string sample_text(const Documents& documents, int64_t document, int64_t num_tokens,
                        const Tokenizer& tokenizer) {
  const int64_t length = documents.length(document);
  std::vector<int32_t> ids(static_cast<size_t>(std::min(length, num_tokens)));
  documents.read(document, 0, static_cast<int64_t>(ids.size()), ids.data());
  StreamDecoder decoder(tokenizer);
  std::string text;
  for (const int32_t id : ids) {
    if (id < 0 || id >= tokenizer.vocab_size() || tokenizer.bytes_of(id).empty()) {
      text += one_line(decoder.finish()) + fmt::format("<{}>", id);
    } else {
      text += one_line(decoder.push(id));
    }
  }
  text += one_line(decoder.finish());
  if (length > num_tokens) text += fmt::format(" … ({} tokens more)", grouped(length - num_tokens));
  return text;
}

/// Bytes of text by decoding; ids outside the vocabulary are counted in `strange`.
int64_t decoded_bytes(const Documents& documents, const Tokenizer& tokenizer, int64_t& strange) {
  int64_t bytes = 0;
  for (int64_t d = 0; d < documents.num_documents(); ++d)
    for (const int32_t id : documents.tokens(d)) {
      const bool known = id >= 0 && id < tokenizer.vocab_size();
      if (known) bytes += static_cast<int64_t>(tokenizer.bytes_of(id).size());
      strange += known ? 0 : 1;
    }
  return bytes;
}

void print_counts(const Documents& documents, int64_t bytes) {
  std::vector<int64_t> lengths(static_cast<size_t>(documents.num_documents()));
  for (size_t d = 0; d < lengths.size(); ++d)
    lengths[d] = documents.length(static_cast<int64_t>(d));
  fmt::print("documents  {}\ntokens     {}\nbytes      {}\n", grouped(documents.num_documents()),
             grouped(documents.num_tokens()), grouped(bytes));
  if (lengths.empty()) return;
  std::sort(lengths.begin(), lengths.end());
  fmt::print("length     {} min, {} median, {} max tokens\n", grouped(lengths.front()),
             grouped(lengths[lengths.size() / 2]), grouped(lengths.back()));
}

void print_samples(const Documents& documents, const InspectArguments& arguments,
                   const Tokenizer& tokenizer) {
  // Spread over the file, the first document among them.
  const int64_t count = documents.num_documents();
  const int64_t samples = std::min(arguments.samples, count);
  for (int64_t s = 0; s < samples; ++s) {
    const auto d = static_cast<int64_t>(static_cast<double>(s) * static_cast<double>(count) /
                                        static_cast<double>(samples));
    fmt::print("\n#{} ({} tokens)\n{}\n", d, grouped(documents.length(d)),
               sample_text(documents, d, arguments.length, tokenizer));
  }
}

void inspect(const InspectArguments& arguments) {
  const auto tokenizer = make_tokenizer(arguments.tokenizer);
  const fs::path prefix = MegatronDocuments::find_prefix(arguments.path);
  std::unique_ptr<Documents> documents;
  int64_t bytes = 0;
  int64_t strange = 0;
  if (!prefix.empty()) {
    auto pair = std::make_unique<MegatronDocuments>(prefix, tokenizer->specials().end_of_document);
    bytes = decoded_bytes(*pair, *tokenizer, strange);
    fmt::print("format     Megatron .bin/.idx, {}, {} sequences, {} end-of-document tokens\n",
               pair->dtype_name(), grouped(pair->num_sequences()),
               pair->have_end_tokens() ? "with" : "without");
    documents = std::move(pair);
  } else {
    if (!fs::exists(arguments.path))
      throw IoError(fmt::format("{} does not exist (nor a pair {}.bin, {}.idx)", arguments.path,
                                arguments.path, arguments.path));
    require(TokenShard::is_shard(arguments.path),
            "{} is neither a token shard nor a Megatron pair; `dsv3 data tokenize` makes a shard "
            "of text",
            arguments.path);
    auto shard = std::make_unique<TokenShard>(arguments.path);
    if (arguments.verify) shard->verify();
    bytes = shard->info().text_bytes;
    fmt::print("format     token shard, {} bytes per token, tokenizer {}{}\n",
               shard->info().bytes_per_token, shard->info().tokenizer,
               arguments.verify ? ", checksum right" : "");
    if (shard->info().tokenizer_checksum != tokenizer->checksum())
      fmt::print("note       another tokenizer's: the samples below are decoded with {}\n",
                 tokenizer->name());
    documents = std::move(shard);
  }
  print_counts(*documents, bytes);
  if (strange > 0)
    fmt::print("note       {} ids are outside the tokenizer {}: another one made this file\n",
               grouped(strange), tokenizer->name());
  print_samples(*documents, arguments, *tokenizer);
}

void add_tokenize(CLI::App& data) {
  CLI::App* command =
      data.add_subcommand("tokenize", "Turn text and JSONL files into a token shard");
  command->footer(kTokenizeExamples);
  auto arguments = std::make_shared<TokenizeArguments>();
  command->add_option("FILE", arguments->files, "Text or JSONL files, also .gz and .zst")
      ->required();
  command->add_option("-o,--out", arguments->out, "The shard to write")->required();
  command->add_option("--tokenizer", arguments->tokenizer, "Tokenizer: bytes")
      ->capture_default_str();
  command
      ->add_option("--document-split", arguments->document_split,
                   "What a document of a text file is: file, line or blank (paragraphs between "
                   "blank lines)")
      ->capture_default_str();
  command
      ->add_option("--jsonl-field", arguments->jsonl_field,
                   "The field of a JSONL line that holds the text")
      ->capture_default_str();
  command->add_option("--workers", arguments->workers, "Threads (default: one for each core)")
      ->check(CLI::Range(1, 1024));
  command->callback([arguments] { tokenize(*arguments); });
}

void add_inspect(CLI::App& data) {
  CLI::App* command =
      data.add_subcommand("inspect", "Show the counts of a shard or Megatron pair, and samples");
  command->footer(kInspectExamples);
  auto arguments = std::make_shared<InspectArguments>();
  command->add_option("PATH", arguments->path, "A token shard, or the prefix of a Megatron pair")
      ->required();
  command->add_option("--samples", arguments->samples, "Documents to print, spread over the file")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, int64_t{1000000}));
  command->add_option("--length", arguments->length, "Tokens to print of each")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{1000000}));
  command->add_option("--tokenizer", arguments->tokenizer, "Tokenizer that decodes: bytes")
      ->capture_default_str();
  command->add_flag("--verify", arguments->verify, "Read the whole shard and check its checksum");
  command->callback([arguments] { inspect(*arguments); });
}

}  // namespace

void add_data_command(CLI::App& app) {
  CLI::App* data = app.add_subcommand("data", "Tokenise text, and look into token files");
  data->require_subcommand(1);
  add_tokenize(*data);
  add_inspect(*data);
}

}  // namespace dsv3::cli
