#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "config/config.h"
#include "data/documents.h"
#include "data/tokenize.h"
#include "data/tokenizer.h"

namespace dsv3 {

/// The files that a source's path names: the path itself, or for a pattern with * ? [ ] the sorted
/// matches. Throws IoError when there is none.
std::vector<std::filesystem::path> expand_source(const std::string& path);

/// Opens what `source` names, told apart by content and name: token shards and Megatron pairs as
/// they are, anything else as text (data/text.h). Texts are tokenised into `cache_dir`, under a
/// name that is made of each file's path, size and modification time, the tokenizer and the
/// splitting, so that a changed text or setting is tokenised anew; an empty `cache_dir` keeps them
/// in memory.
std::shared_ptr<const Documents> open_source(const std::string& path, const DataConfig& data,
                                             const Tokenizer& tokenizer,
                                             const std::filesystem::path& cache_dir,
                                             const TokenizeProgressCallback& progress = {});

/// Where open_source() keeps the tokens of these texts.
std::filesystem::path cache_path(const std::vector<std::filesystem::path>& texts,
                                 const TextOptions& options, const Tokenizer& tokenizer,
                                 const std::filesystem::path& cache_dir);

}  // namespace dsv3
