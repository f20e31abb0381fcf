#include "data/packing.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "base/error.h"
#include "data/hash.h"

namespace dsv3 {
namespace {

// Streams of random numbers that must not repeat each other.
constexpr uint64_t kFimStream = 0x46494d, kDocumentStream = 0x646f63, kSequenceStream = 0x736571;

}  // namespace

int64_t DocumentSubset::size(int64_t num_documents) const {
  if (every == 0) return held_out ? 0 : num_documents;
  const int64_t held = num_documents / every;
  return held_out ? held : num_documents - held;
}

int64_t DocumentSubset::operator()(int64_t i) const {
  if (every == 0) return i;
  return held_out ? i * every + every - 1 : i + i / (every - 1);
}

/// Order and places of one epoch's documents.
struct PackedStream::Epoch {
  int64_t number = -1;
  std::vector<int64_t> order;   // [num_documents] subset index; empty = as they lie
  std::vector<int64_t> starts;  // [num_documents + 1] tokens of the stream before each document

  int64_t document(int64_t place) const {
    return order.empty() ? place : order[static_cast<size_t>(place)];
  }
};

/// Where a document is cut: prefix [0, a), middle [a, b), suffix [b, length).
struct PackedStream::Fim {
  bool applied = false;
  int64_t a = 0, b = 0;
};

PackedStream::PackedStream(std::shared_ptr<const Documents> documents, DocumentSubset subset,
                           const Tokenizer& tokenizer, const PackingOptions& options)
    : documents_(std::move(documents)), subset_(subset), tokenizer_(tokenizer), options_(options) {
  require(options.sequence_length >= 1, "data.sequence_length: expected at least 1, got {}",
          options.sequence_length);
  require(options.overlap >= 0 && options.overlap < options.sequence_length,
          "data.validation_overlap: expected 0 to sequence_length - 1 = {}, got {}",
          options.sequence_length - 1, options.overlap);
  DSV3_CHECK(options.overlap == 0 || !options.wrap, "an overlap is for one ordered pass");
  require(subset.every == 0 || subset.every >= 2,
          "data.validation_every: expected 0 or at least 2, got {}", subset.every);
  const auto& specials = tokenizer.specials();
  require(options.fim_rate == 0 ||
              (specials.fim_prefix >= 0 && specials.fim_suffix >= 0 && specials.fim_middle >= 0),
          "data.fim_rate: the tokenizer '{}' has no fill-in-the-middle tokens; set it to 0",
          tokenizer.name());
  num_documents_ = subset.size(documents_->num_documents());
  for (int64_t i = 0; i < num_documents_; ++i) num_tokens_ += packed_length(i);
  require(num_tokens_ > 0, "{}: no documents {} ({} in all{})", documents_->name(),
          subset.held_out ? "to hold out" : "to train on", documents_->num_documents(),
          subset.every > 0
              ? fmt::format(", data.validation_every is {}; is data.document_split what you want?",
                            subset.every)
              : "");
  const int64_t stride = options.sequence_length - options.overlap;
  const int64_t beyond_first = std::max<int64_t>(0, num_tokens_ - options.sequence_length);
  num_samples_ = 1 + (beyond_first + stride - 1) / stride;
}

PackedStream::~PackedStream() = default;

PackedStream::Fim PackedStream::fim_of(int64_t i) const {
  if (options_.fim_rate <= 0) return {};
  const auto document = static_cast<uint64_t>(subset_(i));
  const uint64_t seed = hash_index(options_.seed ^ kFimStream, document);
  // 53 random bits as a number in [0, 1).
  const double u = static_cast<double>(hash_index(seed, 0) >> 11) * 0x1p-53;
  if (u >= options_.fim_rate) return {};
  const auto length = documents_->length(subset_(i)) - (documents_->have_end_tokens() ? 1 : 0);
  if (length < 2) return {};
  const auto places = static_cast<uint64_t>(length) + 1;
  const auto x = static_cast<int64_t>(below(hash_index(seed, 1), places));
  const auto y = static_cast<int64_t>(below(hash_index(seed, 2), places));
  return {true, std::min(x, y), std::max(x, y)};
}

int64_t PackedStream::packed_length(int64_t i) const {
  return documents_->length(subset_(i)) + (documents_->have_end_tokens() ? 0 : 1) +
         (fim_of(i).applied ? 3 : 0);
}

void PackedStream::check_ids(const int32_t* ids, int64_t count, int64_t i) const {
  const auto vocab_size = static_cast<uint32_t>(tokenizer_.vocab_size());
  for (int64_t t = 0; t < count; ++t)
    if (static_cast<uint32_t>(ids[t]) >= vocab_size)
      throw IoError(fmt::format(
          "{}: document {} holds the token id {}, but the tokenizer '{}' ends at {}: the file is "
          "damaged or was made with another tokenizer",
          documents_->name(), subset_(i), ids[t], tokenizer_.name(), vocab_size - 1));
}

/// Copies part of a document as the stream holds it.
void PackedStream::read_packed(int64_t i, int64_t offset, int64_t count, int32_t* out) const {
  // A piece is one marker, or a range of the stored document.
  struct Piece {
    int64_t begin, end;
    int32_t marker;
  };
  const Fim fim = fim_of(i);
  const int64_t document = subset_(i), stored = documents_->length(document);
  const int64_t body = stored - (documents_->have_end_tokens() ? 1 : 0);
  const auto& ids = tokenizer_.specials();
  const Piece end =
      documents_->have_end_tokens() ? Piece{body, stored, -1} : Piece{0, 1, ids.end_of_document};
  std::array<Piece, 7> pieces{Piece{0, body, -1}, end};
  size_t num_pieces = 2;
  if (fim.applied) {
    pieces = {Piece{0, 1, ids.fim_prefix},
              Piece{0, fim.a, -1},
              Piece{0, 1, ids.fim_suffix},
              Piece{fim.b, body, -1},
              Piece{0, 1, ids.fim_middle},
              Piece{fim.a, fim.b, -1},
              end};
    num_pieces = pieces.size();
  }
  int64_t at = 0;  // first token of the piece
  for (size_t p = 0; p < num_pieces && count > 0; ++p) {
    const Piece& piece = pieces[p];
    const int64_t length = piece.end - piece.begin, skip = offset - at;
    at += length;
    if (skip >= length) continue;
    const int64_t take = std::min(count, length - skip);
    if (piece.marker >= 0) {
      *out = piece.marker;
    } else {
      documents_->read(document, piece.begin + skip, take, out);
      check_ids(out, take, i);
    }
    out += take, offset += take, count -= take;
  }
  DSV3_CHECK(count == 0, "{} tokens beyond document {}", count, document);
}

const PackedStream::Epoch& PackedStream::epoch(int64_t number) const {
  if (epoch_ && (epoch_->number == number || !options_.shuffle)) return *epoch_;
  auto next = std::make_unique<Epoch>();
  next->number = number;
  const auto count = static_cast<size_t>(num_documents_);
  if (options_.shuffle) {
    next->order.resize(count);
    std::iota(next->order.begin(), next->order.end(), int64_t{0});
    const uint64_t seed =
        hash_index(options_.seed ^ kDocumentStream, static_cast<uint64_t>(number));
    for (size_t i = count; i > 1; --i)  // Fisher–Yates
      std::swap(next->order[i - 1], next->order[below(hash_index(seed, i), i)]);
  }
  next->starts.resize(count + 1);
  for (size_t i = 0; i < count; ++i)
    next->starts[i + 1] = next->starts[i] + packed_length(next->document(static_cast<int64_t>(i)));
  DSV3_CHECK(next->starts.back() == num_tokens_, "{} of {}", next->starts.back(), num_tokens_);
  epoch_ = std::move(next);
  return *epoch_;
}

/// Which sequence of its epoch's stream sample `index` is.
int64_t PackedStream::sequence_of(int64_t index) const {
  const int64_t sequence = index % num_samples_;
  if (!options_.shuffle) return sequence;
  const uint64_t seed = hash_index(options_.seed ^ kSequenceStream,
                                   static_cast<uint64_t>(epoch(index / num_samples_).number));
  return static_cast<int64_t>(
      Permutation(static_cast<uint64_t>(num_samples_), seed)(static_cast<uint64_t>(sequence)));
}

std::vector<PackedStream::Span> PackedStream::spans(int64_t index) const {
  const Epoch& epoch = this->epoch(index / num_samples_);
  const int64_t length = options_.sequence_length;
  int64_t at = sequence_of(index) * (length - options_.overlap);
  auto place =
      std::upper_bound(epoch.starts.begin(), epoch.starts.end(), at) - epoch.starts.begin() - 1;
  std::vector<Span> spans;
  for (int64_t t = 0; t < length; ++place) {
    if (place == num_documents_) {
      if (!options_.wrap) break;
      place = 0;
      at = 0;
    }
    const auto p = static_cast<size_t>(place);
    const int64_t take = std::min(length - t, epoch.starts[p + 1] - at);
    spans.push_back({epoch.document(place), at - epoch.starts[p], take});
    t += take, at += take;
  }
  return spans;
}

void PackedStream::fill(int64_t index, Batch& batch, int64_t row) const {
  const int64_t length = options_.sequence_length;
  const auto base = static_cast<size_t>(row * length);
  int32_t* tokens = batch.tokens.data() + base;
  int32_t* labels = batch.labels.data() + base;
  int32_t* positions = batch.positions.data() + base;
  int32_t* documents = batch.documents.data() + base;

  // Label t of the row is a token of the stream; the token before it is its input. With a mask, a
  // sequence that begins within a document begins at position 0 there.
  const int32_t end_of_document = tokenizer_.specials().end_of_document;
  int64_t t = 0;
  int32_t document = 0;
  for (const Span& span : spans(index)) {
    read_packed(span.document, span.offset, span.count, labels + t);
    if (span.offset == 0) {
      tokens[t] = end_of_document;
    } else {
      read_packed(span.document, span.offset - 1, 1, tokens + t);
    }
    std::copy_n(labels + t, span.count - 1, tokens + t + 1);
    for (int64_t k = 0; k < span.count; ++k) {
      positions[t + k] = static_cast<int32_t>(options_.mask_across_documents ? k : t + k);
      documents[t + k] = document;
    }
    t += span.count, ++document;
  }
  for (; t < length; ++t) {
    tokens[t] = tokenizer_.specials().pad;
    labels[t] = kIgnoreLabelId;
    positions[t] = static_cast<int32_t>(options_.mask_across_documents ? 0 : t);
    documents[t] = document;
  }
  if (sequence_of(index) > 0) std::fill_n(labels, options_.overlap, kIgnoreLabelId);
}

std::vector<int32_t> PackedStream::packed_document(int64_t i) const {
  std::vector<int32_t> ids(static_cast<size_t>(packed_length(i)));
  read_packed(i, 0, static_cast<int64_t>(ids.size()), ids.data());
  return ids;
}

int64_t PackedStream::count_bytes() const {
  int64_t bytes = 0;
  for (int64_t i = 0; i < num_documents_; ++i) {
    const auto ids = documents_->tokens(subset_(i));
    check_ids(ids.data(), static_cast<int64_t>(ids.size()), i);
    for (const int32_t id : ids) bytes += static_cast<int64_t>(tokenizer_.bytes_of(id).size());
  }
  return bytes;
}

}  // namespace dsv3
