// A safetensors file of a stranger. Every tensor of an accepted file lies inside it.
#include <vector>

#include "checkpoint/safetensors.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsv3;
  const auto path = fuzz::put("model.safetensors", fuzz::text_of(data, size));
  fuzz::accepts([&] {
    const SafetensorsFile file(path);
    size_t bytes = 0;
    for (const auto& tensor : file.tensors()) {
      bytes += tensor.bytes.size();
      // Reads the first and the last byte.
      if (!tensor.bytes.empty())
        bytes += static_cast<size_t>(tensor.bytes.front() ^ tensor.bytes.back()) & 0;
      if (tensor.numel() > 1 << 16) continue;
      std::vector<float> numbers(static_cast<size_t>(tensor.numel()));
      fuzz::accepts([&] { read_as_float(tensor, path, numbers.data()); });
    }
    fuzz::check(bytes <= size, "tensors overlap or leave the file");
  });
  return 0;
}
