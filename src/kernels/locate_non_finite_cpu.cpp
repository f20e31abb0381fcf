// NaN and infinity in a flat buffer, range by range, on the host.
#include <cmath>

#include "kernels/detail/cpu.h"
#include "kernels/optimizer.h"

namespace dsv3::kernels::cpu {
namespace {

using namespace detail;

template <typename T>
void locate(const LocateNonFinite& p) {
  const T* const x = static_cast<const T*>(p.x);
  const int64_t bytes = p.size * static_cast<int64_t>(sizeof(T)) / p.num_ranges;
  parallel_rows(p.num_ranges, bytes, [&](int64_t first_range, int64_t last_range) {
    for (int64_t r = first_range; r < last_range; ++r) {
      const int64_t begin = p.starts[r], end = r + 1 < p.num_ranges ? p.starts[r + 1] : p.size;
      for (int64_t i = begin; i < end; ++i) {
        if (std::isfinite(load(x + i))) continue;
        ++p.counts[r];
        p.first[r] = std::min(p.first[r], i - begin);
      }
    }
  });
}

}  // namespace

void locate_non_finite(const LocateNonFinite& p) {
  if (p.only_if != nullptr && *p.only_if == 0) return;
  dispatch_float("locate_non_finite", p.dtype,
                 [&](auto* type) { locate<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace dsv3::kernels::cpu
