#include "data/packing.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"
#include "data/data_support.h"

namespace dsv3 {
namespace {

using test::message_of;

constexpr int32_t kEod = 256, kPad = 257, kPrefix = 259, kSuffix = 260, kMiddle = 261;

std::shared_ptr<MemoryDocuments> random_documents(std::mt19937_64& random, int64_t count,
                                                  uint64_t longest) {
  auto documents = std::make_shared<MemoryDocuments>("memory");
  for (int64_t d = 0; d < count; ++d) {
    std::vector<int32_t> tokens(1 + random() % longest);
    for (auto& token : tokens) token = static_cast<int32_t>(random() % 256);
    documents->add(tokens);
  }
  return documents;
}

Batch one_row(const PackedStream& stream, int64_t length, int64_t index) {
  Batch batch;
  batch.num_sequences = 1;
  batch.sequence_length = length;
  for (auto* values : {&batch.tokens, &batch.labels, &batch.positions, &batch.documents})
    values->assign(static_cast<size_t>(length), -7);
  stream.fill(index, batch, 0);
  return batch;
}

/// The stream of documents as they lie: each followed by its end token.
std::vector<int32_t> plain_stream(const Documents& documents) {
  std::vector<int32_t> stream;
  for (int64_t d = 0; d < documents.num_documents(); ++d) {
    const auto tokens = documents.tokens(d);
    stream.insert(stream.end(), tokens.begin(), tokens.end());
    stream.push_back(kEod);
  }
  return stream;
}

TEST(DocumentSubset, SplitsWithoutOverlapOrLoss) {
  for (const int64_t every : {2, 3, 20})
    for (const int64_t count : {0, 1, 2, 19, 20, 21, 100}) {
      const DocumentSubset train{every, false}, held{every, true};
      std::set<int64_t> all;
      for (int64_t i = 0; i < train.size(count); ++i) all.insert(train(i));
      for (int64_t i = 0; i < held.size(count); ++i) {
        EXPECT_EQ(held(i) % every, every - 1);
        all.insert(held(i));
      }
      EXPECT_EQ(static_cast<int64_t>(all.size()), count);
      EXPECT_EQ(train.size(count) + held.size(count), count);
      if (count > 0) {
        EXPECT_EQ(*all.rbegin(), count - 1);
      }
    }
  EXPECT_EQ((DocumentSubset{0, false}).size(5), 5);
}

TEST(Packing, SequencesAreTheStreamOnceThrough) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const ByteTokenizer tokenizer;
  for (int round = 0; round < 30; ++round) {
    const auto documents =
        random_documents(random, 1 + static_cast<int64_t>(random() % 20), 1 + random() % 60);
    const auto length = 1 + static_cast<int64_t>(random() % 40);
    const bool wrap = random() % 2 == 0;
    const PackedStream stream(documents, {}, tokenizer, {.sequence_length = length, .wrap = wrap});
    const auto x = plain_stream(*documents);
    const auto n = static_cast<int64_t>(x.size());
    ASSERT_EQ(stream.num_tokens(), n);
    ASSERT_EQ(stream.num_samples(), (n + length - 1) / length);
    for (int64_t k = 0; k < stream.num_samples(); ++k) {
      const Batch batch = one_row(stream, length, k);
      for (int64_t t = 0; t < length; ++t) {
        const auto i = static_cast<size_t>(t);
        const int64_t p = k * length + t;
        EXPECT_EQ(batch.positions[i], t);
        if (p >= n && !wrap) {
          EXPECT_EQ(batch.labels[i], kIgnoreLabelId);
          EXPECT_EQ(batch.tokens[i], kPad);
          continue;
        }
        EXPECT_EQ(batch.labels[i], x[static_cast<size_t>(p % n)]);
        EXPECT_EQ(batch.tokens[i], x[static_cast<size_t>((p + n - 1) % n)]);
      }
    }
  }
}

TEST(Packing, SpansTellWhereTheLabelsOfASequenceCameFrom) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const ByteTokenizer tokenizer;
  for (int round = 0; round < 30; ++round) {
    const auto documents =
        random_documents(random, 2 + static_cast<int64_t>(random() % 20), 1 + random() % 60);
    const auto length = 1 + static_cast<int64_t>(random() % 40);
    const bool wrap = random() % 2 == 0;
    const PackedStream stream(documents, {.every = 2}, tokenizer,
                              {.sequence_length = length,
                               .seed = seed,
                               .shuffle = random() % 2 == 0,
                               .fim_rate = 0.5,
                               .wrap = wrap});
    for (int64_t k = 0; k < 2 * stream.num_samples(); ++k) {
      std::vector<int32_t> labels;
      for (const auto& span : stream.spans(k)) {
        const auto document = stream.packed_document(span.document);
        const auto begin = document.begin() + span.offset;
        labels.insert(labels.end(), begin, begin + span.count);
      }
      labels.resize(static_cast<size_t>(length), kIgnoreLabelId);
      EXPECT_EQ(labels, one_row(stream, length, k).labels);
    }
  }
}

TEST(Packing, MaskedDocumentsStandAlone) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const ByteTokenizer tokenizer;
  const auto documents = random_documents(random, 50, 20);
  const PackedStream stream(documents, {}, tokenizer,
                            {.sequence_length = 33, .mask_across_documents = true, .wrap = false});
  int64_t labels = 0;
  for (int64_t k = 0; k < stream.num_samples(); ++k) {
    const Batch batch = one_row(stream, 33, k);
    EXPECT_EQ(batch.documents[0], 0);
    EXPECT_EQ(batch.positions[0], 0);
    for (size_t t = 0; t < 33; ++t) {
      if (batch.labels[t] == kIgnoreLabelId) {
        EXPECT_EQ(batch.tokens[t], kPad);
        continue;
      }
      ++labels;
      if (t == 0) continue;
      // A document starts at its leading EOD, and nowhere else.
      const bool starts = batch.tokens[t] == kEod;
      EXPECT_EQ(batch.documents[t], batch.documents[t - 1] + (starts ? 1 : 0));
      EXPECT_EQ(batch.positions[t], starts ? 0 : batch.positions[t - 1] + 1);
      // Within a document the label is the next input; at its end it is EOD.
      if (starts) {
        EXPECT_EQ(batch.labels[t - 1], kEod);
      } else {
        EXPECT_EQ(batch.labels[t - 1], batch.tokens[t]);
      }
    }
  }
  EXPECT_EQ(labels, stream.num_tokens());
}

TEST(Packing, OverlapGivesContextAndCountsEachTokenOnce) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const ByteTokenizer tokenizer;
  for (int round = 0; round < 20; ++round) {
    const auto documents =
        random_documents(random, 1 + static_cast<int64_t>(random() % 10), 1 + random() % 50);
    const auto length = 2 + static_cast<int64_t>(random() % 30);
    const auto overlap = static_cast<int64_t>(random() % static_cast<uint64_t>(length));
    const PackedStream stream(documents, {}, tokenizer,
                              {.sequence_length = length, .overlap = overlap, .wrap = false});
    const auto x = plain_stream(*documents);
    std::vector<int32_t> counted;
    for (int64_t k = 0; k < stream.num_samples(); ++k) {
      const Batch batch = one_row(stream, length, k);
      for (size_t t = 0; t < static_cast<size_t>(length); ++t) {
        if (batch.labels[t] == kIgnoreLabelId) continue;
        EXPECT_GE(static_cast<int64_t>(t), k == 0 ? 0 : overlap);
        counted.push_back(batch.labels[t]);
      }
    }
    EXPECT_EQ(counted, x);
  }
}

TEST(Packing, ShuffleKeepsEveryDocumentAndChangesEachEpoch) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const ByteTokenizer tokenizer;
  // Documents of one length, a divisor of the sequence: each sequence holds whole documents.
  auto documents = std::make_shared<MemoryDocuments>("memory");
  for (int32_t d = 0; d < 200; ++d) documents->add({d, d, d});
  const PackedStream stream(documents, {}, tokenizer,
                            {.sequence_length = 8, .seed = seed, .shuffle = true});
  std::vector<std::vector<int32_t>> orders;
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<int32_t> order;
    for (int64_t k = 0; k < stream.num_samples(); ++k) {
      const Batch batch = one_row(stream, 8, epoch * stream.num_samples() + k);
      for (const size_t t : {0, 4}) {
        EXPECT_EQ(batch.labels[t], batch.labels[t + 2]);
        EXPECT_EQ(batch.labels[t + 3], kEod);
        order.push_back(batch.labels[t]);
      }
    }
    orders.push_back(order);
    std::sort(order.begin(), order.end());
    for (int32_t d = 0; d < 200; ++d) EXPECT_EQ(order[static_cast<size_t>(d)], d);
  }
  EXPECT_NE(orders[0], orders[1]);
  EXPECT_NE(orders[1], orders[2]);
  // The same place gives the same sequence, whatever was asked before.
  const auto again = one_row(stream, 8, 3);
  EXPECT_EQ(again.labels[0], orders[0][6]);
}

TEST(Packing, FimMovesTheMiddleAndLosesNothing) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const ByteTokenizer tokenizer;
  const auto documents = random_documents(random, 2000, 40);
  const PackedStream stream(documents, {}, tokenizer,
                            {.sequence_length = 64, .seed = seed, .fim_rate = 0.3});
  int64_t rewritten = 0, num_tokens = 0;
  for (int64_t d = 0; d < 2000; ++d) {
    auto packed = stream.packed_document(d);
    num_tokens += static_cast<int64_t>(packed.size());
    ASSERT_EQ(packed.back(), kEod);
    packed.pop_back();
    const auto original = documents->tokens(d);
    if (packed == original) continue;
    ++rewritten;
    const auto begin = packed.begin(), end = packed.end();
    const auto suffix = std::find(begin, end, kSuffix), middle = std::find(begin, end, kMiddle);
    ASSERT_EQ(packed.front(), kPrefix);
    ASSERT_TRUE(suffix < middle && middle < end);
    std::vector<int32_t> joined(begin + 1, suffix);
    joined.insert(joined.end(), middle + 1, end);
    joined.insert(joined.end(), suffix + 1, middle);
    EXPECT_EQ(joined, original);
  }
  EXPECT_EQ(num_tokens, stream.num_tokens());
  // 2000 draws at 0.3: 600 within six standard deviations (20.5 each); one-token documents are
  // 1/40.
  EXPECT_NEAR(static_cast<double>(rewritten), 600 * (1 - 1.0 / 40), 125);

  // The sequences hold just these documents.
  std::vector<int32_t> expected, seen;
  for (int64_t d = 0; d < 2000; ++d) {
    const auto packed = stream.packed_document(d);
    expected.insert(expected.end(), packed.begin(), packed.end());
  }
  for (int64_t k = 0; k < stream.num_samples(); ++k) {
    const Batch batch = one_row(stream, 64, k);
    seen.insert(seen.end(), batch.labels.begin(), batch.labels.end());
  }
  seen.resize(expected.size());
  EXPECT_EQ(seen, expected);
}

TEST(Packing, CountsBytesAndNamesStrangeIds) {
  const ByteTokenizer tokenizer;
  auto documents = std::make_shared<MemoryDocuments>("some.file");
  documents->add({1, 2, 3});
  documents->add({4, kPad, 5});
  EXPECT_EQ(PackedStream(documents, {}, tokenizer, {.sequence_length = 4}).count_bytes(), 5);
  documents->add({7, 264});
  const PackedStream stream(documents, {}, tokenizer, {.sequence_length = 16});
  const auto message = message_of<IoError>([&] { one_row(stream, 16, 0); });
  EXPECT_HAS(message, "some.file: document 2 holds the token id 264");
}

TEST(Packing, RefusesWhatCannotBe) {
  const ByteTokenizer tokenizer;
  auto documents = std::make_shared<MemoryDocuments>("few");
  documents->add({1});
  EXPECT_HAS(message_of<std::invalid_argument>([&] {
               PackedStream(documents, {20, true}, tokenizer, {.sequence_length = 4});
             }),
             "few: no documents to hold out (1 in all, data.validation_every is 20");
  EXPECT_HAS(message_of<std::invalid_argument>(
                 [&] { PackedStream(documents, {}, tokenizer, {.sequence_length = 0}); }),
             "data.sequence_length");
  EXPECT_HAS(message_of<std::invalid_argument>([&] {
               PackedStream(documents, {}, tokenizer,
                            {.sequence_length = 4, .overlap = 4, .wrap = false});
             }),
             "data.validation_overlap: expected 0 to sequence_length - 1 = 3, got 4");
}

}  // namespace
}  // namespace dsv3
