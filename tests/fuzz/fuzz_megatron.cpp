// A Megatron pair: the input's first two bytes say how long the .bin is, the rest is the .idx.
#include <algorithm>
#include <vector>

#include "data/megatron.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsv3;
  if (size < 2) return 0;
  const size_t length = std::min<size_t>(data[0] | data[1] << 8, size - 2);
  fuzz::put("pair.bin", fuzz::text_of(data + 2, length));
  fuzz::put("pair.idx", fuzz::text_of(data + 2 + length, size - 2 - length));
  fuzz::accepts([&] {
    const MegatronDocuments documents(fuzz::scratch() / "pair", 2);
    for (int64_t d = 0; d < documents.num_documents(); ++d) {
      std::vector<int32_t> ids(static_cast<size_t>(documents.length(d)));
      documents.read(d, 0, documents.length(d), ids.data());
    }
  });
  return 0;
}
