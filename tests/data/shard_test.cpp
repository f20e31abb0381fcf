#include "data/shard.h"

#include "base/error.h"
#include "data/data_support.h"

namespace dsv3 {
namespace {

using test::message_of;
using test::TemporaryDirectory;

/// A tokenizer with as many ids as one asks for, to reach the wide format.
class WideTokenizer final : public Tokenizer {
 public:
  explicit WideTokenizer(int64_t vocab_size) : vocab_size_(vocab_size) {}
  const std::string& name() const override { return name_; }
  int64_t vocab_size() const override { return vocab_size_; }
  const SpecialTokens& specials() const override { return specials_; }
  uint64_t checksum() const override { return 42; }
  void encode(std::string_view, std::vector<int32_t>&) const override {}
  std::string_view bytes_of(int32_t) const override { return "?"; }

 private:
  std::string name_ = "wide";
  int64_t vocab_size_;
  SpecialTokens specials_{.end_of_document = 0, .pad = 1};
};

TEST(Shard, HoldsWhatWasWritten) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const TemporaryDirectory dir;
  for (const int64_t vocab_size : {264, 65536, 65537, 200000}) {
    const WideTokenizer tokenizer(vocab_size);
    std::vector<std::vector<int32_t>> documents(1 + random() % 50);
    ShardWriter writer(dir / "s", tokenizer);
    int64_t num_tokens = 0;
    for (auto& document : documents) {
      document.resize(random() % 30);  // some empty
      for (auto& id : document)
        id = static_cast<int32_t>(random() % static_cast<uint64_t>(vocab_size));
      if (!document.empty()) document[0] = static_cast<int32_t>(vocab_size - 1);
      num_tokens += static_cast<int64_t>(document.size());
      writer.add(document, 3);
    }
    EXPECT_FALSE(std::filesystem::exists(dir / "s") && vocab_size == 264);
    const ShardInfo info = writer.finish();
    EXPECT_EQ(info.bytes_per_token, vocab_size <= 65536 ? 2 : 4);

    const TokenShard shard(dir / "s");
    EXPECT_TRUE(TokenShard::is_shard(dir / "s"));
    EXPECT_NO_THROW(shard.verify());
    EXPECT_NO_THROW(shard.require_tokenizer(tokenizer));
    ASSERT_EQ(shard.num_documents(), static_cast<int64_t>(documents.size()));
    EXPECT_EQ(shard.num_tokens(), num_tokens);
    EXPECT_EQ(shard.info().text_bytes, 3 * shard.num_documents());
    for (size_t d = 0; d < documents.size(); ++d) {
      EXPECT_EQ(shard.tokens(static_cast<int64_t>(d)), documents[d]);
      if (documents[d].size() < 3) continue;
      int32_t two[2];
      shard.read(static_cast<int64_t>(d), 1, 2, two);
      EXPECT_EQ(two[1], documents[d][2]);
    }
    EXPECT_THROW(shard.length(shard.num_documents()), std::logic_error);
    EXPECT_THROW(shard.length(-1), std::logic_error);
  }
}

TEST(Shard, MayBeEmpty) {
  const TemporaryDirectory dir;
  ShardWriter(dir / "s", ByteTokenizer()).finish();
  const TokenShard shard(dir / "s");
  EXPECT_EQ(shard.num_documents(), 0);
  EXPECT_EQ(shard.num_tokens(), 0);
}

TEST(Shard, AppearsWholeOrNotAtAll) {
  const TemporaryDirectory dir;
  {
    ShardWriter writer(dir / "s", ByteTokenizer());
    writer.add({1, 2, 3}, 3);
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(Shard, RefusesIdsAndTokenizersThatDoNotFit) {
  const TemporaryDirectory dir;
  ShardWriter writer(dir / "s", ByteTokenizer());
  EXPECT_THROW(writer.add({264}, 1), std::invalid_argument);
  EXPECT_THROW(writer.add({-1}, 1), std::invalid_argument);
  ShardWriter other(dir / "t", ByteTokenizer());
  other.add({7}, 1);
  other.finish();
  const auto message = message_of<std::invalid_argument>(
      [&] { TokenShard(dir / "t").require_tokenizer(WideTokenizer(264)); });
  EXPECT_HAS(message, "'bytes'");
  EXPECT_HAS(message, "'wide'");
}

}  // namespace
}  // namespace dsv3
