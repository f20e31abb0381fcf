#include "data/tokenize.h"

#include "base/error.h"
#include "data/data_support.h"
#include "data/shard.h"

namespace dsv3 {
namespace {

using test::message_of;
using test::TemporaryDirectory;
using test::write;
using Tokens = std::vector<std::vector<int32_t>>;

TEST(Tokenize, OrderDoesNotDependOnThreads) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  const ByteTokenizer tokenizer;
  // Several chunks in some files, none in others.
  std::vector<std::filesystem::path> files;
  Tokens expected;
  for (int f = 0; f < 9; ++f) {
    const size_t size = f % 3 == 0 ? 2'500'000 : f % 3 == 1 ? 0 : random() % 5000;
    const std::string text = test::random_text(random, size);
    files.push_back(dir / (std::to_string(f) + (f % 2 == 0 ? ".txt" : ".txt.zst")));
    write(files.back(), f % 2 == 0 ? text : test::zstd(text));
    TextReader reader(files.back(), {.split = DocumentSplit::kLine});
    for (std::string line; reader.next(line);) expected.push_back(tokenizer.encode(line));
  }
  for (const int64_t workers : {1, 2, 7}) {
    SCOPED_TRACE(workers);
    Tokens seen;
    int64_t calls = 0;
    TokenizeProgress last;
    const auto counts = tokenize_files(
        files, {.split = DocumentSplit::kLine}, tokenizer, workers,
        [&](const std::vector<int32_t>& tokens, int64_t bytes) {
          EXPECT_EQ(bytes, static_cast<int64_t>(tokens.size()));
          seen.push_back(tokens);
        },
        [&](const TokenizeProgress& progress) {
          EXPECT_GE(progress.num_documents, last.num_documents);
          last = progress;
          ++calls;
        });
    EXPECT_TRUE(seen == expected);
    EXPECT_GE(calls, 1);
    EXPECT_EQ(counts.num_documents, static_cast<int64_t>(expected.size()));
    EXPECT_EQ(last.num_documents, counts.num_documents);
    EXPECT_EQ(last.files_done, 9);
    EXPECT_EQ(counts.input_read, counts.input_bytes);
  }
}

TEST(Tokenize, TheFirstErrorInOrderWins) {
  const TemporaryDirectory dir;
  const ByteTokenizer tokenizer;
  const auto good = write(dir / "0.jsonl", "{\"text\": \"fine\"}\n");
  std::string late;
  for (int i = 0; i < 100'000; ++i) late += "{\"text\": \"many lines before the bad one\"}\n";
  const auto slow = write(dir / "1.jsonl", late + "bad\n");
  const auto fast = write(dir / "2.jsonl", "bad\n");
  for (int round = 0; round < 3; ++round) {
    const auto message = message_of<std::invalid_argument>([&] {
      tokenize_files({good, slow, fast}, {}, tokenizer, 4, [](const auto&, int64_t) {});
    });
    EXPECT_HAS(message, "1.jsonl:100001: not JSON");
  }
  EXPECT_HAS(message_of<IoError>([&] {
               tokenize_to_shard({good, dir / "none.txt"}, {}, tokenizer, 2, dir / "out");
             }),
             "none.txt");
  EXPECT_FALSE(std::filesystem::exists(dir / "out"));
  EXPECT_FALSE(std::filesystem::exists(dir / "out.tmp"));
}

TEST(Tokenize, MakesAShardOfTheTextAndDropsEmptyDocuments) {
  const TemporaryDirectory dir;
  const auto file =
      write(dir / "a.jsonl", "{\"text\": \"ab\"}\n{\"text\": \"\"}\n{\"text\": \"c\"}\n");
  const auto counts = tokenize_to_shard({file}, {}, ByteTokenizer(), 1, dir / "out");
  EXPECT_EQ(counts.num_documents, 2);
  const TokenShard shard(dir / "out");
  shard.verify();
  EXPECT_EQ(shard.tokens(0), (std::vector<int32_t>{'a', 'b'}));
  EXPECT_EQ(shard.tokens(1), (std::vector<int32_t>{'c'}));
  EXPECT_EQ(shard.info().text_bytes, 3);
}

TEST(Tokenize, NoFilesAndNoWorkers) {
  EXPECT_EQ(tokenize_files({}, {}, ByteTokenizer(), 2, [](const auto&, int64_t) {}).num_tokens, 0);
  EXPECT_THROW(tokenize_files({}, {}, ByteTokenizer(), 0, [](const auto&, int64_t) {}),
               std::invalid_argument);
}

TEST(Tokenize, ATokenizerThatRefusesTextIsAnError) {
  const TemporaryDirectory dir;
  const IdTokenizer ids("ids:300");
  write(dir / "a.txt", "text\n");
  const auto ignore = [](const std::vector<int32_t>&, int64_t) {};
  EXPECT_THROW(tokenize_files({dir / "a.txt"}, {}, ids, 2, ignore, {}), std::invalid_argument);
}

}  // namespace
}  // namespace dsv3
