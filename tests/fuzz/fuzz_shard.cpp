// A token shard, with the footer's checksum set right so that the counts and offsets behind it are
// reached. Every document of an accepted shard reads.
#include <vector>

#include "base/hash.h"
#include "data/shard.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsv3;
  std::string bytes(fuzz::text_of(data, size));
  constexpr size_t kFooter = 128, kChecked = 112;
  if (size >= kFooter && data[0] != 0xFF) {
    const uint64_t sum = hash_bytes(std::string_view(bytes).substr(size - kFooter, kChecked), 0);
    for (size_t i = 0; i < 8; ++i)
      bytes[size - kFooter + kChecked + i] = static_cast<char>(sum >> (8 * i));
  }
  const auto path = fuzz::put("text.tokens", bytes);
  fuzz::accepts([&] {
    const TokenShard shard(path);
    fuzz::accepts([&] { shard.verify(); });
    int64_t tokens = 0;
    for (int64_t d = 0; d < shard.num_documents(); ++d) {
      std::vector<int32_t> ids(static_cast<size_t>(shard.length(d)));
      shard.read(d, 0, shard.length(d), ids.data());
      tokens += shard.length(d);
    }
    fuzz::check(tokens == shard.num_tokens(), "documents do not add up to the shard");
  });
  return 0;
}
