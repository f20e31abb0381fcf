#include "data/sources.h"

#include <glob.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>
#include <thread>

#include "base/error.h"
#include "data/hash.h"
#include "data/megatron.h"
#include "data/shard.h"

namespace dsv3 {
namespace {

namespace fs = std::filesystem;

TextOptions text_options(const DataConfig& data) {
  return {.split = document_split_from_string(data.document_split),
          .jsonl_field = data.jsonl_field};
}

std::shared_ptr<const Documents> open_shard(const fs::path& path, const Tokenizer& tokenizer) {
  auto shard = std::make_shared<TokenShard>(path);
  shard->require_tokenizer(tokenizer);
  return shard;
}

std::shared_ptr<const Documents> open_texts(const std::string& name,
                                            const std::vector<fs::path>& texts,
                                            const DataConfig& data, const Tokenizer& tokenizer,
                                            const fs::path& cache_dir,
                                            const TokenizeProgressCallback& progress) {
  const TextOptions options = text_options(data);
  const int64_t num_workers = data.num_workers > 0
                                  ? data.num_workers
                                  : std::max<int64_t>(1, std::thread::hardware_concurrency());
  if (cache_dir.empty()) {
    auto documents = std::make_shared<MemoryDocuments>(name);
    tokenize_files(
        texts, options, tokenizer, num_workers,
        [&](const std::vector<int32_t>& tokens, int64_t) { documents->add(tokens); }, progress);
    return documents;
  }
  const fs::path shard = cache_path(texts, options, tokenizer, cache_dir);
  if (fs::is_regular_file(shard)) {
    try {
      return open_shard(shard, tokenizer);
    } catch (const IoError&) {
      // A damaged cache is made anew from its text.
    }
  }
  std::error_code error;
  fs::create_directories(cache_dir, error);
  if (error)
    throw IoError(
        fmt::format("cannot create data.cache_dir {}: {}", cache_dir.string(), error.message()));
  // Each process writes under its own name: several ranks may tokenise the same text at once.
  const fs::path own = fmt::format("{}.{}", shard.string(), ::getpid());
  tokenize_to_shard(texts, options, tokenizer, num_workers, own, progress);
  fs::rename(own, shard, error);
  if (error)
    throw IoError(
        fmt::format("cannot rename {} to {}: {}", own.string(), shard.string(), error.message()));
  return open_shard(shard, tokenizer);
}

}  // namespace

std::vector<fs::path> expand_source(const std::string& path) {
  require(!path.empty(), "data: a source has an empty path");
  // A file whose name holds a bracket is still itself.
  if (fs::exists(path) || path.find_first_of("*?[") == std::string::npos) return {path};
  glob_t found{};
  const int result = ::glob(path.c_str(), 0, nullptr, &found);  // sorted by name
  std::vector<fs::path> files;
  for (size_t i = 0; result == 0 && i < found.gl_pathc; ++i) files.emplace_back(found.gl_pathv[i]);
  ::globfree(&found);
  if (files.empty()) throw IoError(fmt::format("data: no file matches {}", path));
  return files;
}

fs::path cache_path(const std::vector<fs::path>& texts, const TextOptions& options,
                    const Tokenizer& tokenizer, const fs::path& cache_dir) {
  std::string key = fmt::format("1\n{:016x}\n{}\n{}\n", tokenizer.checksum(),
                                static_cast<int>(options.split), options.jsonl_field);
  for (const auto& text : texts) {
    std::error_code error;
    const auto size = fs::file_size(text, error);
    if (error) throw IoError(fmt::format("cannot read {}: {}", text.string(), error.message()));
    const auto time = fs::last_write_time(text, error).time_since_epoch().count();
    if (error) throw IoError(fmt::format("cannot read {}: {}", text.string(), error.message()));
    key += fmt::format("{}\n{}\n{}\n", fs::absolute(text).lexically_normal().string(), size, time);
  }
  return cache_dir /
         fmt::format("{}-{:016x}.tokens", texts.front().filename().string(), hash_bytes(key, 0));
}

std::shared_ptr<const Documents> open_source(const std::string& path, const DataConfig& data,
                                             const Tokenizer& tokenizer, const fs::path& cache_dir,
                                             const TokenizeProgressCallback& progress) {
  if (const auto prefix = MegatronDocuments::find_prefix(path); !prefix.empty())
    return std::make_shared<MegatronDocuments>(prefix, tokenizer.specials().end_of_document);

  std::vector<std::shared_ptr<const Documents>> parts;
  std::vector<fs::path> texts;  // neighbours in the list that are tokenised together
  const auto close_texts = [&] {
    if (!texts.empty())
      parts.push_back(open_texts(texts.size() == 1 ? texts.front().string() : path, texts, data,
                                 tokenizer, cache_dir, progress));
    texts.clear();
  };
  for (const auto& file : expand_source(path)) {
    if (!fs::exists(file)) throw IoError(fmt::format("data: {} does not exist", file.string()));
    if (fs::is_directory(file))
      throw IoError(fmt::format("data: {} is a directory; name its files, for example {}/*.jsonl",
                                file.string(), file.string()));
    const auto prefix = MegatronDocuments::find_prefix(file);
    if (!prefix.empty()) {
      if (file.extension() == ".idx") continue;  // its .bin stands for the pair
      close_texts();
      parts.push_back(
          std::make_shared<MegatronDocuments>(prefix, tokenizer.specials().end_of_document));
    } else if (TokenShard::is_shard(file)) {
      close_texts();
      parts.push_back(open_shard(file, tokenizer));
    } else {
      texts.push_back(file);
    }
  }
  close_texts();
  if (parts.empty()) throw IoError(fmt::format("data: {} names no document files", path));
  if (parts.size() == 1) return parts.front();
  return std::make_shared<ConcatenatedDocuments>(path, std::move(parts));
}

}  // namespace dsv3
