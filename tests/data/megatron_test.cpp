#include "data/megatron.h"

#include "base/error.h"
#include "data/megatron_support.h"

namespace dsv3 {
namespace {

using test::TemporaryDirectory;

TEST(Megatron, ReadsEveryElementType) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const char* const names[] = {"",      "uint8",   "int8",    "int16", "int32",
                               "int64", "float64", "float32", "uint16"};
  const int32_t largest[] = {0,          255,        127,      32767, 2000000000,
                             2000000000, 2000000000, 16000000, 65535};
  for (int code = 1; code <= 8; ++code) {
    SCOPED_TRACE(code);
    const TemporaryDirectory dir;
    std::vector<std::vector<std::vector<int32_t>>> documents(1 + random() % 10);
    std::vector<std::vector<int32_t>> flat(documents.size());
    int64_t num_tokens = 0;
    for (size_t d = 0; d < documents.size(); ++d) {
      documents[d].resize(random() % 4);  // documents of no, one and several sequences
      for (auto& sequence : documents[d]) {
        sequence.resize(random() % 6);
        for (auto& token : sequence)
          token = static_cast<int32_t>(random() % (static_cast<uint64_t>(largest[code]) + 1));
        flat[d].insert(flat[d].end(), sequence.begin(), sequence.end());
      }
      num_tokens += static_cast<int64_t>(flat[d].size());
    }
    test::megatron_pair(documents, code).save(dir / "corpus");
    const MegatronDocuments pair(dir / "corpus", -2);
    EXPECT_STREQ(pair.dtype_name(), names[code]);
    ASSERT_EQ(pair.num_documents(), static_cast<int64_t>(flat.size()));
    EXPECT_EQ(pair.num_tokens(), num_tokens);
    EXPECT_FALSE(pair.have_end_tokens());
    for (size_t d = 0; d < flat.size(); ++d) {
      const auto index = static_cast<int64_t>(d);
      EXPECT_EQ(pair.tokens(index), flat[d]);
      const auto length = pair.length(index);
      for (int64_t offset = 0; offset < length; ++offset) {
        std::vector<int32_t> part(static_cast<size_t>(length - offset));
        pair.read(index, offset, length - offset, part.data());
        EXPECT_TRUE(std::equal(part.begin(), part.end(), flat[d].begin() + offset));
      }
    }
  }
}

TEST(Megatron, ValuesThatAreNoIdReadAsMinusOne) {
  const TemporaryDirectory dir;
  auto pair = test::megatron_pair({{{0, 0, 0}}}, 6);
  pair.data.clear();
  for (const double value : {1.5, 1e300, std::nan("")}) test::append(pair.data, value);
  pair.save(dir / "c");
  EXPECT_EQ(MegatronDocuments(dir / "c", 0).tokens(0), (std::vector<int32_t>{-1, -1, -1}));
}

TEST(Megatron, NoticesEndTokens) {
  const TemporaryDirectory dir;
  test::megatron_pair({{{1, 2, 256}}, {{3, 256}}}, 8).save(dir / "with");
  EXPECT_TRUE(MegatronDocuments(dir / "with", 256).have_end_tokens());
  EXPECT_FALSE(MegatronDocuments(dir / "with", 255).have_end_tokens());
}

TEST(Megatron, FindsThePairByAnyOfItsNames) {
  const TemporaryDirectory dir;
  test::megatron_pair({{{1}}}, 8).save(dir / "a.b_document");
  for (const char* name : {"a.b_document", "a.b_document.bin", "a.b_document.idx"})
    EXPECT_EQ(MegatronDocuments::find_prefix(dir / name), dir / "a.b_document");
  std::filesystem::remove(dir / "a.b_document.bin");
  EXPECT_TRUE(MegatronDocuments::find_prefix(dir / "a.b_document").empty());
}

}  // namespace
}  // namespace dsv3
