// FP32 as a sum of BF16 terms on the host.

#include "base/error.h"
#include "kernels/detail/cpu.h"
#include "kernels/routing.h"

namespace dsv3::kernels {

void check_split_bf16(const SplitBf16& p) {
  require(p.num_terms >= 1 && p.num_terms <= kMaxSplitTerms,
          "[split_bf16] num_terms: expected 1 to {}, got {}", kMaxSplitTerms, p.num_terms);
  for (int32_t i = 0; i < p.num_terms; ++i) {
    require(p.terms[i] >= 0 && p.terms[i] <= 2, "[split_bf16] terms: expected 0, 1 or 2, got {}",
            p.terms[i]);
  }
}

namespace cpu {
namespace {

using namespace detail;

DSV3_CLONES void split_rows(const SplitBf16& p, int64_t begin, int64_t end) {
  const int64_t columns = p.num_columns;
  for (int64_t r = begin; r < end; ++r) {
    const float* const x = p.x + r * columns;
    BFloat16* const y = static_cast<BFloat16*>(p.y) + r * p.row_stride;
    for (int32_t i = 0; i < p.num_terms; ++i) {
      BFloat16* const out = y + i * p.term_stride;
      for (int64_t c = 0; c < columns; ++c) {
        BFloat16 term;
        store(&term, x[c]);
        float rest = x[c];
        for (int32_t j = 0; j < p.terms[i]; ++j) {
          rest -= load(&term);
          store(&term, rest);
        }
        out[c] = term;
      }
    }
  }
}

}  // namespace

void split_bf16(const SplitBf16& p) {
  check_split_bf16(p);
  parallel_rows(p.num_rows, (4 + 2 * p.num_terms) * p.num_columns,
                [&](int64_t begin, int64_t end) { split_rows(p, begin, end); });
}

}  // namespace cpu
}  // namespace dsv3::kernels
