#include "data/loader.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <set>

#include "base/error.h"
#include "data/data_support.h"
#include "data/shard.h"

namespace dsv3 {
namespace {

using test::message_of;
using test::TemporaryDirectory;
using test::write;
using Rows = std::vector<std::vector<int32_t>>;

constexpr int32_t kEod = 256;

/// Lines "0 …", "1 …" of random lengths.
std::string numbered_lines(std::mt19937_64& random, int count) {
  std::string text;
  for (int line = 0; line < count; ++line)
    text += std::to_string(line) + " " + test::random_text(random, random() % 60, false) + "\n";
  return text;
}

DataConfig config_of(std::vector<DataSource> train, int64_t sequence_length) {
  DataConfig data;
  data.train = std::move(train);
  data.document_split = "line";
  data.sequence_length = sequence_length;
  return data;
}

bool equal(const Batch& a, const Batch& b) {
  return a.num_sequences == b.num_sequences && a.sequence_length == b.sequence_length &&
         a.tokens == b.tokens && a.labels == b.labels && a.positions == b.positions &&
         a.documents == b.documents;
}

Rows rows_of(const Batch& batch) {
  Rows rows;
  for (int64_t row = 0; row < batch.num_sequences; ++row) {
    const auto begin = batch.labels.begin() + row * batch.sequence_length;
    rows.emplace_back(begin, begin + batch.sequence_length);
  }
  return rows;
}

TEST(Loader, ValidationCountsEveryHeldOutByteOnce) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  const auto a = write(dir / "a.txt", numbered_lines(random, 311));
  const auto b = write(dir / "b.txt", numbered_lines(random, 45));
  for (const int64_t overlap : {0, 11})
    for (const int64_t num_ranks : {1, 3})
      for (const bool mask : {false, true}) {
        auto data = config_of({{a.string(), 1}, {b.string(), 5}}, 29);
        data.validation_every = 20;
        data.validation_overlap = overlap;
        data.mask_across_documents = mask;
        std::string expected;
        int64_t documents = 0;
        for (const auto& path : {a, b}) {
          TextReader reader(path, {.split = DocumentSplit::kLine});
          std::string line;
          for (int64_t i = 0; reader.next(line); ++i)
            if (i % 20 == 19) expected += line, ++documents;
        }
        // Samples go to ranks in turn; putting their rows back in order gives the stream.
        std::vector<Rows> of_rank;
        for (int64_t rank = 0; rank < num_ranks; ++rank) {
          Loader loader(data, {.split = Split::kValidation, .rank = rank, .num_ranks = num_ranks});
          EXPECT_EQ(loader.bytes(), static_cast<int64_t>(expected.size()));
          EXPECT_EQ(loader.num_documents(), documents);
          EXPECT_EQ(loader.num_tokens(), loader.bytes() + documents);
          Rows rows;
          int64_t batches = 0;
          for (; !loader.done(); ++batches)
            for (auto& row : rows_of(loader.next(2))) rows.push_back(row);
          EXPECT_EQ(batches, loader.num_batches(2));
          const Batch after = loader.next(2);
          EXPECT_EQ(std::count(after.labels.begin(), after.labels.end(), kIgnoreLabelId), 2 * 29);
          EXPECT_EQ(std::ranges::count(after.documents, kPaddingDocument), 2 * 29);
          of_rank.push_back(rows);
        }
        std::string seen;
        int64_t ends = 0;
        for (size_t row = 0; row < of_rank[0].size(); ++row)
          for (const Rows& rows : of_rank)
            for (const int32_t label : rows[row]) {
              if (label >= 0 && label < 256) seen += static_cast<char>(label);
              ends += label == kEod;
            }
        EXPECT_EQ(seen, expected);
        EXPECT_EQ(ends, documents);
      }
}

TEST(Loader, SplitsAreDisjointAndComplete) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  const auto path = write(dir / "a.txt", numbered_lines(random, 203));
  auto data = config_of({{path.string(), 1}}, 64);
  data.validation_every = 7;
  std::map<std::string, int> seen;  // document → 1 train, 2 validation
  for (const Split split : {Split::kTrain, Split::kValidation}) {
    data.shuffle = false;  // documents must follow each other to be cut out of the sequences
    Loader loader(data, {.split = split});
    std::string document;
    for (const auto& row : rows_of(loader.next(loader.num_samples())))
      for (const int32_t label : row) {
        if (label == kEod) {
          seen[document] |= split == Split::kTrain ? 1 : 2;
          document.clear();
        } else if (label >= 0) {
          document += static_cast<char>(label);
        }
      }
  }
  EXPECT_EQ(seen.size(), 203u);
  int held_out = 0;
  for (const auto& [document, splits] : seen) {
    const bool held = std::stoi(document) % 7 == 6;
    EXPECT_EQ(splits, held ? 2 : 1) << document;
    held_out += held;
  }
  EXPECT_EQ(held_out, 29);
}

TEST(Loader, ResumesAtTheExactSample) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  const auto a = write(dir / "a.txt", numbered_lines(random, 90));
  const auto b = write(dir / "b.txt", numbered_lines(random, 30));
  auto data = config_of({{a.string(), 0.7}, {b.string(), 0.3}}, 31);
  data.fim_rate = 0.4;
  for (const bool mask : {false, true}) {
    data.mask_across_documents = mask;
    Loader whole(data, {.seed = 5});
    std::vector<Batch> batches;
    std::vector<LoaderState> states;
    for (int step = 0; step < 60; ++step) {  // several epochs of both
      states.push_back(whole.state());
      batches.push_back(whole.next(4));
    }
    EXPECT_GT(states.back().next_sample, whole.num_samples());
    for (int trial = 0; trial < 8; ++trial) {
      const size_t from = random() % batches.size();
      Loader resumed(data, {.seed = 5});
      resumed.restore(loader_state_from_json(to_json(states[from])));
      for (size_t step = from; step < batches.size(); ++step)
        ASSERT_TRUE(equal(resumed.next(4), batches[step])) << from << " " << step;
    }
    Loader other(data, {.seed = 6});
    EXPECT_FALSE(equal(other.next(4), batches[0]));
    EXPECT_HAS(message_of<std::invalid_argument>([&] { other.restore(states[3]); }),
               "other data or settings");
  }
}

TEST(Loader, DamagedStatesAreRefused) {
  const TemporaryDirectory dir;
  Loader loader(config_of({{write(dir / "a.txt", "x\ny\n").string(), 1}}, 4), {});
  for (const char* json : {"", "{}", "[]", "{\"next_sample\": 1}", "nonsense",
                           "{\"next_sample\":1,\"source_samples\":\"x\",\"fingerprint\":\"0\"}",
                           "{\"next_sample\":1,\"source_samples\":[1],\"fingerprint\":\"zz\"}"})
    EXPECT_HAS(message_of<std::invalid_argument>([&] { loader_state_from_json(json); }), "damaged");
  auto state = loader.state();
  state.next_sample = 2;
  EXPECT_HAS(message_of<std::invalid_argument>([&] { loader.restore(state); }), "damaged");
  state.source_samples = {-1};
  EXPECT_THROW(loader.restore(state), std::invalid_argument);
}

TEST(Loader, RanksShareTheSameGlobalBatches) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  const auto a = write(dir / "a.txt", numbered_lines(random, 100));
  const auto b = write(dir / "b.txt", numbered_lines(random, 50));
  const auto data = config_of({{a.string(), 1}, {b.string(), 2}}, 23);
  constexpr int64_t kGlobal = 12;
  Loader alone(data, {.seed = static_cast<int64_t>(seed)});
  std::vector<std::multiset<std::vector<int32_t>>> expected;
  std::vector<LoaderState> states;
  for (int step = 0; step < 10; ++step) {
    const auto rows = rows_of(alone.next(kGlobal));
    expected.emplace_back(rows.begin(), rows.end());
    states.push_back(alone.state());
  }
  for (const int64_t num_ranks : {2, 3, 4})
    for (const int64_t micro_batch : {1, 3}) {
      std::vector<std::unique_ptr<Loader>> loaders;
      for (int64_t rank = 0; rank < num_ranks; ++rank)
        loaders.push_back(std::make_unique<Loader>(
            data, LoaderOptions{
                      .seed = static_cast<int64_t>(seed), .rank = rank, .num_ranks = num_ranks}));
      for (size_t step = 0; step < expected.size(); ++step) {
        std::multiset<std::vector<int32_t>> together;
        for (auto& loader : loaders) {
          for (int64_t left = kGlobal / num_ranks; left > 0; left -= micro_batch)
            for (const auto& row : rows_of(loader->next(std::min(left, micro_batch))))
              together.insert(row);
          // Another number of ranks may go on from here.
          EXPECT_EQ(loader->state(), states[step]);
        }
        EXPECT_EQ(together, expected[step]);
      }
    }
}

TEST(Loader, BlendKeepsToItsShares) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  for (int round = 0; round < 10; ++round) {
    std::vector<DataSource> sources;
    std::vector<double> shares;
    double sum = 0;
    const size_t count = 1 + random() % 6;
    for (size_t i = 0; i < count; ++i) {
      const auto path = write(dir / (std::to_string(i) + ".txt"), "text\nmore\n");
      const double weight = round == 0 ? static_cast<double>(i + 1)
                                       : 0.01 + static_cast<double>(random() % 1000) / 100;
      sources.push_back({path.string(), weight});
      shares.push_back(weight);
      sum += weight;
    }
    Loader loader(config_of(sources, 4), {});
    for (int g = 1; g <= 2000; ++g) {
      loader.next(1);
      const auto state = loader.state();
      for (size_t i = 0; i < count; ++i)
        ASSERT_LT(std::abs(static_cast<double>(state.source_samples[i]) - g * shares[i] / sum),
                  1 + 1e-6)
            << "source " << i << " of " << count << " after " << g;
    }
  }
}

TEST(Loader, TrainingIsEndlessEvenOnATinyText) {
  const TemporaryDirectory dir;
  Loader loader(config_of({{write(dir / "a.txt", "ab").string(), 1}}, 16), {});
  EXPECT_EQ(loader.num_samples(), 1);
  const Batch batch = loader.next(3);
  for (size_t t = 0; t < 48; ++t) {
    const int32_t expected[] = {'a', 'b', kEod};
    EXPECT_EQ(batch.labels[t], expected[t % 16 % 3]);
  }
  EXPECT_FALSE(loader.done());
}

TEST(Loader, OwnValidationFilesLeaveTrainingWhole) {
  const TemporaryDirectory dir;
  const auto a = write(dir / "a.txt", "1\n2\n3\n4\n"), b = write(dir / "b.txt", "x\ny\n");
  auto data = config_of({{a.string(), 1}}, 8);
  data.validation = {{b.string(), 1}};
  data.validation_every = 2;
  EXPECT_EQ(Loader(data, {}).num_documents(), 4);
  Loader validation(data, {.split = Split::kValidation});
  EXPECT_EQ(validation.num_documents(), 2);
  EXPECT_EQ(validation.bytes(), 4);
}

TEST(Loader, ErrorsSayWhatToSet) {
  const TemporaryDirectory dir;
  const auto a = write(dir / "a.txt", "1\n2\n3\n4\n").string();
  const auto error_of = [&](const DataConfig& data, LoaderOptions options) {
    return message_of<std::invalid_argument>([&] { Loader loader(data, options); });
  };
  EXPECT_HAS(error_of(config_of({}, 8), {}), "data.train: names no source");
  EXPECT_HAS(error_of(config_of({{a, 1}}, 8), {.split = Split::kValidation}),
             "set data.validation_every or data.validation");
  EXPECT_HAS(error_of(config_of({{a, 0}}, 8), {}), "expected a weight above 0, got 0");
  EXPECT_HAS(error_of(config_of({{a, NAN}}, 8), {}), "expected a weight above 0");
  EXPECT_HAS(error_of(config_of({{a, 1}}, 8), {.rank = 2, .num_ranks = 2}), "rank 2 of 2");
  auto data = config_of({{a, 1}}, 8);
  data.validation_every = 20;
  EXPECT_HAS(error_of(data, {.split = Split::kValidation}), "no documents to hold out (4 in all");
  data.validation_every = 1;
  EXPECT_HAS(error_of(data, {}), "data.validation_every: expected 0 or at least 2");
  const auto empty = write(dir / "empty.txt", "").string();
  EXPECT_HAS(error_of(config_of({{empty, 1}}, 8), {}), "empty.txt: no documents to train on");
  ShardWriter(dir / "none.tokens", ByteTokenizer()).finish();
  EXPECT_HAS(error_of(config_of({{(dir / "none.tokens").string(), 1}}, 8), {}), "no documents");
}

TEST(Loader, ReadsTheSameFromTextCacheAndShard) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  const auto text = write(dir / "a.txt", numbered_lines(random, 100));
  tokenize_to_shard({text}, {.split = DocumentSplit::kLine}, ByteTokenizer(), 2, dir / "a.tokens");
  Loader memory(config_of({{text.string(), 1}}, 32), {});
  Loader cached(config_of({{text.string(), 1}}, 32), {.default_cache_dir = dir / "cache"});
  Loader shard(config_of({{(dir / "a.tokens").string(), 1}}, 32), {});
  EXPECT_TRUE(std::filesystem::exists(dir / "cache"));
  const Batch expected = memory.next(20);
  EXPECT_TRUE(equal(cached.next(20), expected));
  EXPECT_TRUE(equal(shard.next(20), expected));
}

/// A batch of the tiny config is a few thousand tokens and its step takes tenths of a second; a
/// batch must cost next to nothing beside it. The figure is recorded, not asserted.
TEST(Loader, CostOfABatch) {
  const uint64_t seed = test::fresh_seed();
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  Loader loader(
      config_of({{write(dir / "a.txt", numbered_lines(random, 30'000)).string(), 1}}, 256), {});
  loader.next(1);
  const auto start = std::chrono::steady_clock::now();
  for (int step = 0; step < 100; ++step) EXPECT_EQ(loader.next(16).labels.size(), 4096u);
  const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
  RecordProperty("microseconds_per_4096_tokens", std::to_string(time.count() / 100));
}

}  // namespace
}  // namespace dsv3
