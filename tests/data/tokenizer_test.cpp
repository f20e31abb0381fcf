#include "data/tokenizer.h"

#include <set>

#include "data/data_support.h"
#include "data/hash.h"

namespace dsv3 {
namespace {

using test::message_of;

TEST(ByteTokenizer, GivesBackEveryByte) {
  const ByteTokenizer tokenizer;
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all += static_cast<char>(byte);
  const auto ids = tokenizer.encode(all);
  ASSERT_EQ(ids.size(), 256u);
  for (int byte = 0; byte < 256; ++byte) EXPECT_EQ(ids[static_cast<size_t>(byte)], byte);
  EXPECT_EQ(tokenizer.decode(ids), all);
  EXPECT_TRUE(tokenizer.encode("").empty());
}

TEST(ByteTokenizer, SpecialsAreDistinctAndDecodeToNothing) {
  const ByteTokenizer tokenizer;
  const auto& s = tokenizer.specials();
  const std::set<int32_t> ids{s.end_of_document, s.pad,        s.bos,
                              s.fim_prefix,      s.fim_suffix, s.fim_middle};
  EXPECT_EQ(ids.size(), 6u);
  for (int32_t id = 256; id < tokenizer.vocab_size(); ++id) EXPECT_EQ(tokenizer.bytes_of(id), "");
  EXPECT_GE(*ids.begin(), 256);
  EXPECT_LT(*ids.rbegin(), tokenizer.vocab_size());
  EXPECT_EQ(tokenizer.vocab_size() % 8, 0);
  EXPECT_THROW(tokenizer.bytes_of(264), std::invalid_argument);
  EXPECT_THROW(tokenizer.bytes_of(-1), std::invalid_argument);
}

TEST(MakeTokenizer, NamesWhatItDoesNotKnow) {
  EXPECT_EQ(make_tokenizer("bytes")->name(), "bytes");
  const auto message =
      message_of<std::invalid_argument>([] { make_tokenizer("models/tokenizer.json"); });
  EXPECT_HAS(message, "models/tokenizer.json");
  EXPECT_HAS(message, "not supported yet");
}

std::string streamed(const std::string& bytes) {
  const ByteTokenizer tokenizer;
  StreamDecoder decoder(tokenizer);
  std::string text;
  for (const int32_t id : tokenizer.encode(bytes)) text += decoder.push(id);
  return text + decoder.finish();
}

TEST(StreamDecoder, HoldsBackUnfinishedCharacters) {
  const ByteTokenizer tokenizer;
  StreamDecoder decoder(tokenizer);
  EXPECT_EQ(decoder.push('a'), "a");
  EXPECT_EQ(decoder.push(0xE2), "");
  EXPECT_EQ(decoder.push(0x82), "");
  EXPECT_EQ(decoder.push(tokenizer.specials().pad), "");
  EXPECT_EQ(decoder.push(0xAC), "\xE2\x82\xAC");
  EXPECT_EQ(decoder.push(0xF0), "");
  EXPECT_EQ(decoder.push('b'),
            "\xEF\xBF\xBD"
            "b");
  EXPECT_EQ(decoder.push(0xC3), "");
  EXPECT_EQ(decoder.finish(), "\xEF\xBF\xBD");
  EXPECT_EQ(decoder.finish(), "");
}

TEST(StreamDecoder, PassesValidTextAndReplacesTheRest) {
  const std::string valid =
      "A\xC2\x80\xDF\xBF\xE0\xA0\x80\xED\x9F\xBF\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF!";
  EXPECT_EQ(streamed(valid), valid);
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(streamed("\x80"), r);                          // stray continuation
  EXPECT_EQ(streamed("\xC0\xAF"), r + r);                  // overlong
  EXPECT_EQ(streamed("\xED\xA0\x80"), r + r + r);          // surrogate
  EXPECT_EQ(streamed("\xF4\x90\x80\x80"), r + r + r + r);  // beyond U+10FFFF
  EXPECT_EQ(streamed("\xE2\x82x"), r + "x");
}

TEST(Permutation, IsOne) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(seed);
  for (const uint64_t size : {1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097}) {
    const Permutation permutation(size, seed);
    std::set<uint64_t> seen;
    uint64_t fixed = 0;
    for (uint64_t i = 0; i < size; ++i) {
      const uint64_t image = permutation(i);
      ASSERT_LT(image, size);
      seen.insert(image);
      fixed += image == i;
    }
    EXPECT_EQ(seen.size(), size);
    if (size >= 100) {
      EXPECT_LT(fixed, 20u);  // about one is expected
    }
  }
}

TEST(IdTokenizer, TakesIdsAsTheyAre) {
  const auto plain = make_tokenizer("ids:50257");
  EXPECT_EQ(plain->vocab_size(), 50257);
  EXPECT_EQ(plain->specials().end_of_document, 50256);
  const auto chosen = make_tokenizer("ids:32000:2");
  EXPECT_EQ(chosen->vocab_size(), 32000);
  EXPECT_EQ(chosen->specials().end_of_document, 2);
  EXPECT_EQ(chosen->specials().pad, 2);
  EXPECT_NE(chosen->checksum(), plain->checksum());
  EXPECT_EQ(chosen->bytes_of(31999), "");
  EXPECT_THROW(chosen->bytes_of(32000), std::invalid_argument);
  EXPECT_THROW(chosen->encode("text"), std::invalid_argument);
}

TEST(IdTokenizer, RefusesOtherForms) {
  for (const char* spec : {"ids:", "ids:x", "ids:0", "ids:-4", "ids:10:10", "ids:10:-1",
                           "ids:10:", "ids:10:3:4", "ids:99999999999999999999", "ids:16777217"}) {
    EXPECT_THROW(make_tokenizer(spec), std::invalid_argument) << spec;
  }
}

}  // namespace
}  // namespace dsv3
