// Texts to tokenise: plain, JSON lines, gzip and zstd, by the input's first byte; and the
// tokenizer's way back to text, which is whole UTF-8 whatever the ids are.
#include <algorithm>
#include <memory>
#include <vector>

#include "data/text.h"
#include "data/tokenizer.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsv3;
  if (size < 1) return 0;
  static const char* const kNames[] = {"a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst"};
  static constexpr DocumentSplit kSplits[] = {DocumentSplit::kFile, DocumentSplit::kLine,
                                              DocumentSplit::kBlank};
  const std::string_view text = fuzz::text_of(data + 1, size - 1);
  const ByteTokenizer tokenizer;
  const auto path = fuzz::put(kNames[data[0] % 4], text);
  fuzz::accepts([&] {
    TextReader reader(path, {.split = kSplits[data[0] / 4 % 3]});
    // A few bytes of gzip can stand for a gigabyte: read as the tokenizer does, document by
    // document.
    std::string document;
    for (size_t bytes = 0; bytes < (16 << 20) && reader.next(document); bytes += document.size()) {
      const auto ids = tokenizer.encode(document);
      fuzz::check(tokenizer.decode(ids) == document, "text does not survive its tokens");
    }
  });
  StreamDecoder decoder(tokenizer);
  std::string streamed;
  for (const char c : text) streamed += decoder.push(static_cast<uint8_t>(c));
  streamed += decoder.finish();
  // Whole characters are decoded to themselves: decoding them again changes nothing.
  StreamDecoder again(tokenizer);
  std::string twice;
  for (const char c : streamed) twice += again.push(static_cast<uint8_t>(c));
  fuzz::check(twice + again.finish() == streamed, "the stream is not whole UTF-8");
  fuzz::accepts([&] { make_tokenizer("ids:" + std::string(text.substr(0, 64))); });
  return 0;
}
