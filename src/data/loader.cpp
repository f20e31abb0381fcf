#include "data/loader.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "data/hash.h"
#include "data/sources.h"

namespace dsv3 {
namespace {

uint64_t fingerprint_of(const std::string& description) {
  return hash_bytes(description, 0);
}

void append_padding(const Tokenizer& tokenizer, int64_t length, Batch& batch, int64_t row) {
  const auto base = row * length;
  for (int64_t t = 0; t < length; ++t) {
    const auto at = static_cast<size_t>(base + t);
    batch.tokens[at] = tokenizer.specials().pad;
    batch.labels[at] = kIgnoreLabelId;
    batch.positions[at] = static_cast<int32_t>(t);
    batch.documents[at] = 0;
  }
}

}  // namespace

std::string to_json(const LoaderState& state) {
  return nlohmann::json{{"next_sample", state.next_sample},
                        {"source_samples", state.source_samples},
                        {"fingerprint", fmt::format("{:016x}", state.fingerprint)}}
      .dump();
}

LoaderState loader_state_from_json(const std::string& json) {
  try {
    const auto value = nlohmann::json::parse(json);
    LoaderState state;
    state.next_sample = value.at("next_sample").get<int64_t>();
    state.source_samples = value.at("source_samples").get<std::vector<int64_t>>();
    const auto fingerprint = value.at("fingerprint").get<std::string>();
    size_t used = 0;
    state.fingerprint = std::stoull(fingerprint, &used, 16);
    require(used == fingerprint.size(), "fingerprint '{}' is not hexadecimal", fingerprint);
    return state;
  } catch (const std::exception& error) {
    invalid("the data loader's saved state is damaged: {}", error.what());
  }
}

Loader::Loader(const DataConfig& data, const LoaderOptions& options)
    : split_(options.split),
      sequence_length_(data.sequence_length),
      rank_(options.rank),
      num_ranks_(options.num_ranks),
      tokenizer_(make_tokenizer(data.tokenizer)) {
  require(num_ranks_ >= 1 && rank_ >= 0 && rank_ < num_ranks_,
          "data-parallel rank {} of {}: expected 0 <= rank < ranks", rank_, num_ranks_);
  open_sources(data, options);

  std::string description =
      fmt::format("{} {} {} {} {} {} {} {}", static_cast<int>(split_), data.sequence_length,
                  options.seed, data.shuffle, data.mask_across_documents, data.fim_rate,
                  data.validation_overlap, tokenizer_->checksum());
  for (const Source& source : sources_) {
    num_documents_ += source.stream->num_documents();
    num_tokens_ += source.stream->num_tokens();
    num_samples_ += source.stream->num_samples();
    description += fmt::format("; {} {} {}", source.stream->num_documents(),
                               source.stream->num_tokens(), source.share);
  }
  state_.fingerprint = fingerprint_of(description);
  rewind();
}

Loader::~Loader() = default;

void Loader::open_sources(const DataConfig& data, const LoaderOptions& options) {
  const bool validation = split_ == Split::kValidation;
  const bool own_files = validation && !data.validation.empty();
  const auto& sources = own_files ? data.validation : data.train;
  require(!sources.empty(), "data.train: names no source; set data.train=[{{path: FILE}}]");
  require(!validation || own_files || data.validation_every > 0,
          "data: there is nothing to validate on; set data.validation_every or data.validation");
  // With files of its own for validation, training keeps every document.
  const int64_t every = data.validation.empty() ? data.validation_every : 0;
  require(every == 0 || every >= 2, "data.validation_every: expected 0 or at least 2, got {}",
          every);
  const std::filesystem::path cache =
      data.cache_dir.empty() ? options.default_cache_dir : std::filesystem::path(data.cache_dir);

  PackingOptions packing{.sequence_length = data.sequence_length,
                         .seed = 0,
                         .shuffle = data.shuffle && !validation,
                         .mask_across_documents = data.mask_across_documents,
                         .fim_rate = validation ? 0 : data.fim_rate,
                         .overlap = validation ? data.validation_overlap : 0,
                         .wrap = !validation};
  const DocumentSubset subset{.every = every, .held_out = validation && !own_files};
  double weights = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    require(std::isfinite(sources[i].weight) && sources[i].weight > 0,
            "data: source {}: expected a weight above 0, got {}", sources[i].path,
            sources[i].weight);
    auto documents = open_source(sources[i].path, data, *tokenizer_, cache, options.progress);
    // A small source of several may have no document to hold out.
    if (validation && sources.size() > 1 && subset.size(documents->num_documents()) == 0) continue;
    packing.seed = hash_index(static_cast<uint64_t>(options.seed), i);
    sources_.push_back(
        {std::make_unique<PackedStream>(std::move(documents), subset, *tokenizer_, packing),
         sources[i].weight, sources[i].path});
    weights += sources[i].weight;
  }
  require(!sources_.empty(), "data: no source has a document to hold out; validation_every is {}",
          every);
  for (Source& source : sources_) source.share /= weights;
}

/// The source of the next sample. Training: job k of a source with share w is due between samples
/// (k-1)/w and k/w; of those that have begun, the earliest due goes first. Unit jobs on one
/// machine: every one meets its window (Baruah et al. 1996), so no source is ever a whole sample
/// off its share.
size_t Loader::pick_source() const {
  if (split_ == Split::kValidation) {
    size_t source = 0;
    while (source + 1 < sources_.size() &&
           state_.source_samples[source] >= sources_[source].stream->num_samples())
      ++source;
    return source;
  }
  constexpr double kRounding = 1e-12;  // quotients that are whole but for rounding stay whole
  const auto now = static_cast<double>(state_.next_sample);
  size_t best = 0;
  double best_due = INFINITY;
  bool best_begun = false;
  for (size_t i = 0; i < sources_.size(); ++i) {
    const auto done = static_cast<double>(state_.source_samples[i]);
    const double share = sources_[i].share;
    const bool begun = std::floor(done / share * (1 + kRounding)) <= now;
    const double due = std::ceil((done + 1) / share * (1 - kRounding));
    if ((begun && !best_begun) || (begun == best_begun && due < best_due))
      best = i, best_due = due, best_begun = begun;
  }
  return best;
}

Batch Loader::next(int64_t num_sequences) {
  require(num_sequences >= 0, "a batch of {} sequences", num_sequences);
  Batch batch;
  batch.num_sequences = num_sequences;
  batch.sequence_length = sequence_length_;
  const auto size = static_cast<size_t>(num_sequences * sequence_length_);
  for (auto* values : {&batch.tokens, &batch.labels, &batch.positions, &batch.documents})
    values->resize(size);
  batch.origins.resize(static_cast<size_t>(num_sequences));
  for (int64_t row = 0; row < num_sequences; ++row)
    for (int64_t rank = 0; rank < num_ranks_; ++rank) {
      const bool mine = rank == rank_;
      if (done()) {
        if (mine) append_padding(*tokenizer_, sequence_length_, batch, row);
      } else {
        const size_t source = pick_source();
        if (mine) {
          sources_[source].stream->fill(state_.source_samples[source], batch, row);
          batch.origins[static_cast<size_t>(row)] = {static_cast<int32_t>(source),
                                                     state_.source_samples[source]};
        }
        ++state_.source_samples[source];
        ++state_.next_sample;
      }
    }
  return batch;
}

std::string Loader::describe(const SampleOrigin& origin) const {
  if (origin.source < 0) return "padding";
  const Source& source = sources_[static_cast<size_t>(origin.source)];
  const auto& stream = *source.stream;
  std::string text = fmt::format("{} sample {}:", source.path, origin.index);
  for (const auto& span : stream.spans(origin.index))
    text += fmt::format(" {}[{}:{}]", stream.subset()(span.document), span.offset,
                        span.offset + span.count);
  return text;
}

void Loader::restore(const State& state) {
  require(state.fingerprint == state_.fingerprint && state.source_samples.size() == sources_.size(),
          "the saved state of the data loader belongs to other data or settings (sources, "
          "tokenizer, sequence_length, seed, shuffle, fim_rate, …); resume with those of the run");
  int64_t sum = 0;
  for (const int64_t count : state.source_samples) {
    require(count >= 0 && count <= state.next_sample - sum,
            "the data loader's saved state is damaged: {} samples are not the sum of its sources",
            state.next_sample);
    sum += count;
  }
  require(sum == state.next_sample,
          "the data loader's saved state is damaged: {} samples, but its sources gave {}",
          state.next_sample, sum);
  state_ = state;
}

void Loader::rewind() {
  state_.next_sample = 0;
  state_.source_samples.assign(sources_.size(), 0);
}

int64_t Loader::num_batches(int64_t num_sequences) const {
  require(num_sequences >= 1, "a batch of {} sequences", num_sequences);
  const int64_t together = num_sequences * num_ranks_;
  return (num_samples_ + together - 1) / together;
}

int64_t Loader::bytes() const {
  if (bytes_ < 0) {
    bytes_ = 0;
    for (const Source& source : sources_) bytes_ += source.stream->count_bytes();
  }
  return bytes_;
}

}  // namespace dsv3
