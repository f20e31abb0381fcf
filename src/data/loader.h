#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "config/config.h"
#include "data/batch.h"
#include "data/packing.h"
#include "data/tokenize.h"
#include "data/tokenizer.h"

namespace dsv3 {

enum class Split : uint8_t { kTrain, kValidation };

struct LoaderOptions {
  Split split = Split::kTrain;
  int64_t seed = 1;       // training.seed
  int64_t rank = 0;       // data-parallel rank, 0 <= rank < num_ranks
  int64_t num_ranks = 1;  // data-parallel ranks
  // Where text is kept tokenised when data.cache_dir is empty; empty too = in memory only.
  std::filesystem::path default_cache_dir = {};
  TokenizeProgressCallback progress = {};  // while text is tokenised; may be empty
};

/// Where a Loader stands: small, exact, and the same for any number of ranks at the end of a global
/// batch.
struct LoaderState {
  int64_t next_sample = 0;              // samples handed out to all ranks together
  std::vector<int64_t> source_samples;  // how many of them came from each source
  uint64_t fingerprint = 0;             // of the data and the settings that order it
  bool operator==(const LoaderState&) const = default;
};

/// One line of JSON, for checkpoints.
std::string to_json(const LoaderState& state);
/// Throws std::invalid_argument on anything that to_json() does not write.
LoaderState loader_state_from_json(const std::string& json);

/// Batches of packed sequences from the sources that `data` names (data/packing.h says how a
/// sequence is cut).
///
/// Training: the sources are blended by weight (after any number of samples, each source has given
/// its share to within one sample); documents and sequences are shuffled anew each
/// epoch; it never ends. Sample g of the run goes to rank g mod num_ranks, so that a global batch
/// is the same set of sequences for any number of ranks, and any micro-batch size.
///
/// Validation: one ordered pass over data.validation or, where that is empty, over every
/// data.validation_every-th document of each training source (the documents that training then
/// leaves out). Every token and end-of-document token of the split is a label exactly once; the
/// last sequence is padded with labels of kIgnoreLabelId. After the pass, batches are all padding.
/// With data.validation_overlap, sequences overlap by that many tokens, which only give context to
/// the labels behind them.
class Loader {
 public:
  using State = LoaderState;

  /// Opens (and where they are text, tokenises or finds in the cache) all sources. Throws
  /// std::invalid_argument where the config names nothing usable, IoError where a file fails.
  Loader(const DataConfig& data, const LoaderOptions& options);
  ~Loader();

  /// This rank's next sequences: [num_sequences · S] each. Throws IoError where a source holds an
  /// id outside the tokenizer's vocabulary.
  Batch next(int64_t num_sequences);

  /// Where a sequence of a batch came from: "SOURCE sample I: DOCUMENT[BEGIN:END] …", with the
  /// index of each document in the source and the tokens of it that are labels, END not included.
  std::string describe(const SampleOrigin& origin) const;

  State state() const { return state_; }
  /// Continues exactly where `state` was taken. Throws std::invalid_argument when it was taken from
  /// other data or other settings.
  void restore(const State& state);
  /// Back to the first sample.
  void rewind();

  /// Validation: whether all samples have been handed out to all ranks. Training: never.
  bool done() const { return split_ == Split::kValidation && state_.next_sample >= num_samples(); }

  /// Sequences of one pass over every source, all ranks together.
  int64_t num_samples() const { return num_samples_; }
  /// Calls of next(num_sequences) on each rank until done().
  int64_t num_batches(int64_t num_sequences) const;
  int64_t num_documents() const { return num_documents_; }
  /// Labels of one pass: tokens of the documents, with their end-of-document tokens.
  int64_t num_tokens() const { return num_tokens_; }
  /// Bytes of text of one pass, without special tokens: bits per byte = summed nats / ln 2 / bytes.
  /// Decodes the whole split once on its first call.
  int64_t bytes() const;

  const Tokenizer& tokenizer() const { return *tokenizer_; }
  int64_t sequence_length() const { return sequence_length_; }

 private:
  struct Source {
    std::unique_ptr<PackedStream> stream;
    double share = 0;       // of the blend; all sum to 1
    std::string path = {};  // as data.train names it
  };
  void open_sources(const DataConfig& data, const LoaderOptions& options);
  size_t pick_source() const;

  Split split_;
  int64_t sequence_length_, rank_, num_ranks_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::vector<Source> sources_;
  int64_t num_samples_ = 0, num_documents_ = 0, num_tokens_ = 0;
  mutable int64_t bytes_ = -1;
  State state_;
};

}  // namespace dsv3
