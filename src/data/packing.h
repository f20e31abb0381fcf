#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/batch.h"
#include "data/documents.h"
#include "data/tokenizer.h"

namespace dsv3 {

/// Which documents of a source a split takes: with every = n > 0, document i is held out when
/// i mod n = n - 1; every = 0 takes all. Random access, nothing stored.
struct DocumentSubset {
  int64_t every = 0;
  bool held_out = false;  // the held-out ones, or the rest

  int64_t size(int64_t num_documents) const;
  /// Index in the source of the subset's document `i`.
  int64_t operator()(int64_t i) const;
};

struct PackingOptions {
  int64_t sequence_length = 0;  // S
  uint64_t seed = 0;            // of shuffling and FIM; differs between sources
  bool shuffle = false;         // documents, then sequences, anew each epoch
  bool mask_across_documents = false;
  double fim_rate = 0;  // share of documents rewritten
  int64_t overlap = 0;  // tokens of each sequence that only give context; 0 <= overlap < S
  bool wrap = true;     // the last sequence of an epoch goes on with the epoch's first tokens;
                        // false: it is padded with labels of kIgnoreLabelId
};

/// A source packed into sequences of S tokens.
///
/// The stream of an epoch is its documents in their (shuffled) order, each followed by its
/// end-of-document token (EOD): x[0] … x[N-1]. Sequence k has labels x[kS] … x[kS+S-1] and as
/// tokens the labels' predecessors, x[kS-1] … x[kS+S-2], where x[-1] is EOD. So it is S+1
/// consecutive tokens of the stream, the next sequence starts S later, and each token is a label
/// exactly once. With `overlap` o, sequences advance by S-o; all but the first ignore their first o
/// labels, which the sequence before has counted.
///
/// An EOD as an input is what the next document's first token is predicted from: it counts to that
/// document. `documents` numbers the documents within a sequence from 0. With
/// mask_across_documents, positions restart at each document's leading EOD, so that no label
/// depends on another document and none is lost. Without it, positions are 0 … S-1.
///
/// FIM (technical report §4.1): a share `fim_rate` of the documents, chosen and cut by a hash of
/// the document's index, reads <prefix> pre <suffix> suf <middle> mid EOD instead.
class PackedStream {
 public:
  /// Throws std::invalid_argument when the subset holds no token, or FIM is asked of a tokenizer
  /// without its markers.
  PackedStream(std::shared_ptr<const Documents> documents, DocumentSubset subset,
               const Tokenizer& tokenizer, const PackingOptions& options);
  ~PackedStream();

  const Documents& documents() const { return *documents_; }
  const DocumentSubset& subset() const { return subset_; }
  int64_t num_documents() const { return num_documents_; }
  /// N: the tokens of one epoch, EOD and FIM markers included.
  int64_t num_tokens() const { return num_tokens_; }
  /// Sequences of one epoch.
  int64_t num_samples() const { return num_samples_; }

  /// Part of one sequence: labels [0, count) of it are tokens offset … of a document.
  struct Span {
    int64_t document = 0;  // its place in the subset
    int64_t offset = 0;    // within the document as packed: FIM applied, EOD at its end
    int64_t count = 0;
  };
  /// The spans of sequence `index` in order, as fill() writes it; fewer than S labels in all where
  /// the sequence ends in padding.
  std::vector<Span> spans(int64_t index) const;

  /// Writes sequence `index` mod num_samples() of epoch `index` / num_samples() into row `row` of a
  /// batch whose vectors have their sizes.
  void fill(int64_t index, Batch& batch, int64_t row) const;

  /// The document at `i` of the subset as the stream holds it: FIM applied, EOD at its end.
  std::vector<int32_t> packed_document(int64_t i) const;
  /// Bytes of text of all documents.
  int64_t count_bytes() const;

 private:
  struct Epoch;
  struct Fim;
  const Epoch& epoch(int64_t number) const;
  int64_t sequence_of(int64_t index) const;
  Fim fim_of(int64_t i) const;
  int64_t packed_length(int64_t i) const;
  void read_packed(int64_t i, int64_t offset, int64_t count, int32_t* out) const;
  void check_ids(const int32_t* ids, int64_t count, int64_t i) const;

  std::shared_ptr<const Documents> documents_;
  DocumentSubset subset_;
  const Tokenizer& tokenizer_;
  PackingOptions options_;
  int64_t num_documents_ = 0, num_tokens_ = 0, num_samples_ = 0;
  mutable std::unique_ptr<Epoch> epoch_;  // the epoch last asked for
};

}  // namespace dsv3
