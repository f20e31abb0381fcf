// Files that lie: cut short, with bytes flipped, with counts that overflow. A reader may refuse
// them or read them, but never leave the file.
#include "base/error.h"
#include "data/hash.h"
#include "data/megatron.h"
#include "data/megatron_support.h"
#include "data/shard.h"

namespace dsv3 {
namespace {

using test::message_of;
using test::TemporaryDirectory;
using test::write;

std::string shard_bytes(const TemporaryDirectory& dir) {
  ShardWriter writer(dir / "good", ByteTokenizer());
  writer.add({1, 2, 3}, 3);
  writer.add({}, 0);
  writer.add({4, 5}, 2);
  writer.finish();
  return read_file(dir / "good");
}

void read_everything(const Documents& documents) {
  int64_t sum = 0;
  for (int64_t d = 0; d < documents.num_documents(); ++d)
    for (const int32_t id : documents.tokens(d)) sum += id;
  EXPECT_NE(sum, INT64_MIN);
}

TEST(HostileShard, EveryTruncationIsRefused) {
  const TemporaryDirectory dir;
  const std::string good = shard_bytes(dir);
  for (size_t length = 0; length < good.size(); ++length) {
    write(dir / "cut", good.substr(0, length));
    const auto message = message_of<IoError>([&] { TokenShard shard(dir / "cut"); });
    EXPECT_HAS(message, "cut: not a whole token shard");
  }
  write(dir / "longer", good + good);
  EXPECT_THROW(TokenShard(dir / "longer"), IoError);
}

TEST(HostileShard, EveryFlippedBitIsNoticed) {
  const TemporaryDirectory dir;
  const std::string good = shard_bytes(dir);
  for (size_t at = 0; at < good.size(); ++at)
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << bit));
      write(dir / "bad", bad);
      EXPECT_THROW(
          {
            const TokenShard shard(dir / "bad");
            read_everything(shard);
            shard.verify();
          },
          IoError)
          << "byte " << at << " bit " << bit;
    }
}

/// Counts that lie under a footer whose checksum is right: only the file's size can tell.
TEST(HostileShard, HugeCountsUnderARightChecksumAreRefused) {
  const TemporaryDirectory dir;
  const std::string good = shard_bytes(dir);
  const size_t footer = good.size() - 128;
  for (const size_t field : {size_t{0}, size_t{8}, size_t{16}})  // documents, tokens, bytes
    for (const uint64_t value :
         {uint64_t{1} << 32, uint64_t{1} << 61, (uint64_t{1} << 61) - 1, uint64_t{1} << 63,
          UINT64_MAX / 2 + 1, UINT64_MAX - 1, UINT64_MAX}) {
      std::string bad = good;
      std::memcpy(bad.data() + footer + field, &value, 8);
      const uint64_t checksum = hash_bytes(std::string_view(bad).substr(footer, 112), 0);
      std::memcpy(bad.data() + footer + 112, &checksum, 8);
      write(dir / "bad", bad);
      if (field == 16 && value <= INT64_MAX) {
        EXPECT_NO_THROW(read_everything(TokenShard(dir / "bad")));  // a wrong sum harms nothing
      } else {
        EXPECT_THROW(TokenShard(dir / "bad"), IoError) << field << " " << value;
      }
    }
}

TEST(HostileShard, OffsetsThatLeaveTheFileAreRefused) {
  const TemporaryDirectory dir;
  const std::string good = shard_bytes(dir);
  const size_t offsets = good.size() - 128 - 4 * 8;
  for (size_t entry = 0; entry < 4; ++entry)
    for (const uint64_t value : {uint64_t{1}, uint64_t{4}, uint64_t{6}, uint64_t{1} << 40,
                                 uint64_t{1} << 63, UINT64_MAX}) {
      uint64_t now = 0;
      std::string bad = good;
      std::memcpy(&now, bad.data() + offsets + entry * 8, 8);
      // Entry 1 and 2 may be any split of the five tokens: that is a shard too.
      std::memcpy(bad.data() + offsets + entry * 8, &value, 8);
      write(dir / "bad", bad);
      try {
        read_everything(TokenShard(dir / "bad"));
        EXPECT_TRUE(value <= 5 && (entry == 1 || entry == 2)) << entry << " " << value;
      } catch (const IoError& error) {
        EXPECT_HAS(std::string(error.what()), "document");
      }
    }
}

TEST(HostileMegatron, EveryTruncationIsRefused) {
  const TemporaryDirectory dir;
  const auto good = test::megatron_pair({{{1, 2}, {3}}, {{4, 5, 6}}}, 8);
  for (size_t length = 0; length < good.index.size(); ++length) {
    auto bad = good;
    bad.index.resize(length);
    bad.save(dir / "cut");
    const auto message = message_of<IoError>([&] { MegatronDocuments documents(dir / "cut", 0); });
    EXPECT_HAS(message, "cut.idx: not a Megatron index");
  }
  for (size_t length = 0; length < good.data.size(); ++length) {
    auto bad = good;
    bad.data.resize(length);
    bad.save(dir / "cut");
    EXPECT_HAS(message_of<IoError>([&] { MegatronDocuments documents(dir / "cut", 0); }), "leaves");
  }
}

TEST(HostileMegatron, FlippedBitsNeverLeaveTheFiles) {
  const TemporaryDirectory dir;
  const auto good = test::megatron_pair({{{1, 2}, {3}}, {{4, 5, 6}}}, 4);
  int refused = 0;
  for (size_t at = 0; at < good.index.size(); ++at)
    for (int bit = 0; bit < 8; ++bit) {
      auto bad = good;
      bad.index[at] = static_cast<char>(bad.index[at] ^ (1 << bit));
      bad.save(dir / "bad");
      try {
        read_everything(MegatronDocuments(dir / "bad", 0));
      } catch (const IoError&) {
        ++refused;
      }
    }
  EXPECT_GT(refused, 100);
}

TEST(HostileMegatron, HugeCountsAreRefused) {
  const TemporaryDirectory dir;
  const auto good = test::megatron_pair({{{1, 2}}}, 8);
  for (const size_t at : {size_t{18}, size_t{26}})
    for (const uint64_t count : {uint64_t{0}, uint64_t{1} << 32, UINT64_MAX / 12, UINT64_MAX / 8,
                                 UINT64_MAX / 20 + 1, UINT64_MAX}) {
      if (at == 18 && count == 0) continue;  // no sequences: the documents refuse it below
      auto bad = good;
      std::memcpy(bad.index.data() + at, &count, 8);
      bad.save(dir / "bad");
      EXPECT_THROW(MegatronDocuments(dir / "bad", 0), IoError) << at << " " << count;
    }
}

}  // namespace
}  // namespace dsv3
