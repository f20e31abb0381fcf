#include "data/text.h"

#include "base/error.h"
#include "data/data_support.h"

namespace dsv3 {
namespace {

using test::message_of;
using test::TemporaryDirectory;
using test::write;
using Texts = std::vector<std::string>;

Texts read_all(const std::filesystem::path& path, TextOptions options) {
  TextReader reader(path, options);
  Texts documents;
  for (std::string document; reader.next(document);) documents.push_back(document);
  EXPECT_EQ(reader.input_read(), static_cast<int64_t>(std::filesystem::file_size(path)));
  return documents;
}

TEST(TextReader, SplitsTheThreeWays) {
  const TemporaryDirectory dir;
  const auto path = write(dir / "a.txt", "one\ntwo\n\n \t\nthree\r\nfour");
  EXPECT_EQ(read_all(path, {.split = DocumentSplit::kFile}),
            Texts{"one\ntwo\n\n \t\nthree\r\nfour"});
  EXPECT_EQ(read_all(path, {.split = DocumentSplit::kLine}),
            (Texts{"one\n", "two\n", "three\r\n", "four"}));
  EXPECT_EQ(read_all(path, {.split = DocumentSplit::kBlank}),
            (Texts{"one\ntwo\n", "three\r\nfour"}));
}

TEST(TextReader, EmptyAndBlankFiles) {
  const TemporaryDirectory dir;
  const auto empty = write(dir / "empty.txt", ""), blank = write(dir / "blank.txt", "\n\n \n");
  for (const auto split : {DocumentSplit::kLine, DocumentSplit::kBlank}) {
    EXPECT_TRUE(read_all(empty, {.split = split}).empty());
    EXPECT_TRUE(read_all(blank, {.split = split}).empty());
  }
  EXPECT_EQ(read_all(empty, {.split = DocumentSplit::kFile}), Texts{""});
  EXPECT_TRUE(read_all(write(dir / "empty.jsonl", ""), {}).empty());
}

TEST(TextReader, CompressedFilesReadTheSame) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  // Larger than the blocks of reading and decompression; the repeated part inflates a lot.
  std::string text = test::random_text(random, 700'000 + random() % 1000);
  text += std::string(3'000'000, 'x') + "\nend";
  const auto plain = read_all(write(dir / "a.txt", text), {.split = DocumentSplit::kLine});
  EXPECT_GT(plain.size(), 1000u);
  for (const bool two_members : {false, true}) {
    const auto pack = [&](auto compress) {
      return two_members ? compress(text.substr(0, 1234)) + compress(text.substr(1234))
                         : compress(text);
    };
    EXPECT_EQ(read_all(write(dir / "a.txt.gz", pack(test::gzip)), {.split = DocumentSplit::kLine}),
              plain);
    EXPECT_EQ(read_all(write(dir / "a.zst", pack(test::zstd)), {.split = DocumentSplit::kLine}),
              plain);
  }
  // The first bytes decide, not the name.
  EXPECT_EQ(read_all(write(dir / "b.txt", test::gzip(text)), {.split = DocumentSplit::kFile}),
            Texts{text});
}

TEST(TextReader, BrokenCompressionIsNamed) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  const std::string text = test::random_text(random, 300'000);
  for (const std::string& whole : {test::gzip(text), test::zstd(text)}) {
    for (const size_t length : {whole.size() / 2, whole.size() - 1, size_t{12}}) {
      const auto path = write(dir / "cut.gz", whole.substr(0, length));
      const auto message =
          message_of<IoError>([&] { read_all(path, {.split = DocumentSplit::kLine}); });
      EXPECT_HAS(message, "cut.gz");
      EXPECT_HAS(message, "it ends too early");
    }
  }
  std::string damaged = test::gzip(text);
  for (size_t i = 20; i < damaged.size(); i += 97) damaged[i] = static_cast<char>(~damaged[i]);
  const auto path = write(dir / "damaged.gz", damaged);
  EXPECT_HAS(message_of<IoError>([&] { read_all(path, {}); }), "damaged.gz: broken gzip file");
}

TEST(TextReader, MissingFilesAndDirectories) {
  const TemporaryDirectory dir;
  EXPECT_HAS(message_of<IoError>([&] { TextReader(dir / "none.txt", {}); }), "none.txt");
  EXPECT_HAS(message_of<IoError>([&] { TextReader(dir.path(), {}); }), "directory");
}

TEST(TextReader, JsonLines) {
  const TemporaryDirectory dir;
  const std::string lines =
      "{\"text\": \"one\\ntwo \\u20ac\", \"id\": 3}\n\n{\"id\": 1, \"text\": "
      "\"\"}\r\n{\"text\":\"end\"}";
  const Texts expected{"one\ntwo \xE2\x82\xAC", "", "end"};
  EXPECT_EQ(read_all(write(dir / "a.jsonl", lines), {}), expected);
  EXPECT_EQ(read_all(write(dir / "a.ndjson.zst", test::zstd(lines)), {}), expected);
  EXPECT_EQ(read_all(write(dir / "b.jsonl", "{\"content\": \"x\", \"text\": 1}"),
                     {.jsonl_field = "content"}),
            Texts{"x"});
}

TEST(TextReader, JsonErrorsNameFileAndLine) {
  const TemporaryDirectory dir;
  const auto error_of = [&](const std::string& bad) {
    const auto path = write(dir / "a.jsonl", "{\"text\": \"fine\"}\n\n" + bad + "\n");
    const auto message = message_of<std::invalid_argument>([&] { read_all(path, {}); });
    EXPECT_HAS(message, path.string() + ":3: ");
    return message;
  };
  EXPECT_HAS(error_of("{\"text\": "), "not JSON");
  EXPECT_HAS(error_of("{\"text\": \"\xff\"}"), "not JSON");
  EXPECT_HAS(error_of("[1]"), "expected an object with a field \"text\", got array");
  EXPECT_HAS(error_of("{\"body\": \"x\"}"), "no field \"text\"");
  EXPECT_HAS(error_of("{\"text\": 5}"), "expected a string, got number");
  EXPECT_HAS(error_of("{\"text\": null}"), "got null");
}

TEST(DocumentSplit, NamesTheChoices) {
  EXPECT_EQ(document_split_from_string("blank"), DocumentSplit::kBlank);
  EXPECT_HAS(message_of<std::invalid_argument>([] { document_split_from_string("verse"); }),
             "'verse' is not one of file, line, blank");
}

}  // namespace
}  // namespace dsv3
