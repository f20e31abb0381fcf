#include "data/sources.h"

#include <algorithm>

#include "base/error.h"
#include "data/megatron_support.h"
#include "data/shard.h"

namespace dsv3 {
namespace {

using test::message_of;
using test::TemporaryDirectory;
using test::write;

DataConfig by_line() {
  DataConfig data;
  data.document_split = "line";
  return data;
}

std::vector<std::string> texts_of(const Documents& documents) {
  std::vector<std::string> texts;
  for (int64_t d = 0; d < documents.num_documents(); ++d)
    texts.push_back(ByteTokenizer().decode(documents.tokens(d)));
  return texts;
}

int count_files(const std::filesystem::path& directory) {
  return static_cast<int>(std::distance(std::filesystem::directory_iterator(directory), {}));
}

TEST(Sources, CacheIsUsedAndGoesStale) {
  const TemporaryDirectory dir;
  const ByteTokenizer tokenizer;
  const auto text = write(dir / "a.txt", "one\ntwo\n");
  const auto cache = dir / "cache";
  const auto open = [&](const DataConfig& data) {
    return texts_of(*open_source(text.string(), data, tokenizer, cache));
  };
  using Texts = std::vector<std::string>;
  EXPECT_EQ(open(by_line()), (Texts{"one\n", "two\n"}));
  EXPECT_EQ(count_files(cache), 1);

  // A second opening reads the cache: it shows what the cache holds.
  const auto shard = cache_path({text}, {.split = DocumentSplit::kLine}, tokenizer, cache);
  ASSERT_TRUE(std::filesystem::exists(shard));
  {
    ShardWriter writer(shard, tokenizer);
    writer.add({'!'}, 1);
    writer.finish();
  }
  EXPECT_EQ(open(by_line()), Texts{"!"});

  // Another splitting, another text and a damaged cache are tokenised anew.
  EXPECT_EQ(open(DataConfig{}), Texts{"one\ntwo\n"});
  EXPECT_EQ(count_files(cache), 2);
  write(text, "three\n");
  EXPECT_EQ(open(by_line()), Texts{"three\n"});
  EXPECT_EQ(count_files(cache), 3);
  const auto now = cache_path({text}, {.split = DocumentSplit::kLine}, tokenizer, cache);
  write(now, read_file(now).substr(0, 50));
  EXPECT_EQ(open(by_line()), Texts{"three\n"});

  // The same size at another time is another text.
  write(text, "THREE\n");
  std::filesystem::last_write_time(
      text, std::filesystem::last_write_time(text) + std::chrono::seconds(1));
  EXPECT_EQ(open(by_line()), Texts{"THREE\n"});
}

TEST(Sources, PatternsMixAllFormats) {
  const TemporaryDirectory dir;
  const ByteTokenizer tokenizer;
  write(dir / "1.txt", "a\nb\n");
  write(dir / "2.jsonl.gz", test::gzip("{\"text\": \"c\"}\n"));
  ShardWriter writer(dir / "3.tokens", tokenizer);
  writer.add({'d'}, 1);
  writer.finish();
  test::megatron_pair({{{'e'}}, {{'f'}}}, 8).save(dir / "4_document");
  write(dir / "5.txt", "g\n");
  const auto documents = open_source((dir / "*").string(), by_line(), tokenizer, "");
  EXPECT_EQ(texts_of(*documents),
            (std::vector<std::string>{"a\n", "b\n", "c", "d", "e", "f", "g\n"}));
  EXPECT_EQ(documents->num_tokens(), 10);
  EXPECT_THROW(documents->length(7), std::logic_error);

  const auto pair = open_source((dir / "4_document").string(), by_line(), tokenizer, "");
  EXPECT_EQ(pair->num_documents(), 2);
}

TEST(Sources, ErrorsNameThePath) {
  const TemporaryDirectory dir;
  const ByteTokenizer tokenizer;
  const auto error_of = [&](const std::string& path) {
    return message_of<IoError>([&] { open_source(path, by_line(), tokenizer, ""); });
  };
  EXPECT_HAS(error_of((dir / "none.txt").string()), "none.txt does not exist");
  EXPECT_HAS(error_of((dir / "*.txt").string()), "no file matches");
  EXPECT_HAS(error_of(dir.path().string()), "is a directory; name its files");
  write(dir / "bad.tokens", std::string("DSV3TOK\0", 8) + std::string(300, 'x'));
  EXPECT_HAS(error_of((dir / "bad.tokens").string()), "bad.tokens: not a whole token shard");
}

}  // namespace
}  // namespace dsv3
