// The embedding table on the host. Backward sorts the tokens by id (counting, so in token order),
// then each thread sums its own columns of every run: no two threads meet in one element.
#include <numeric>

#include "kernels/detail/cpu.h"
#include "kernels/elementwise.h"

namespace dsv3::kernels {

int64_t embedding_backward_scratch(int64_t num_tokens, int64_t vocab, int64_t hidden, bool cuda) {
  if (cuda) return cuda::embedding_backward_scratch(num_tokens, vocab, hidden);
  return (num_tokens + vocab + 1) * static_cast<int64_t>(sizeof(int32_t));
}

namespace cpu {
namespace {

using detail::load;
using detail::store;

void check_ids(const int32_t* ids, int64_t num_tokens, int64_t vocab) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    require(ids[t] >= 0 && ids[t] < vocab, "[embedding] ids[{}] is {}, expected 0 … {}", t, ids[t],
            vocab - 1);
  }
}

/// Columns one thread takes at a time; their sum stays in registers and the first cache level.
constexpr int64_t kColumns = 64;

/// starts [V + 1]: where each id's tokens begin in `order` [T], ascending.
struct Runs {
  const int32_t* starts;
  const int32_t* order;
};

Runs sort_by_id(const EmbeddingBackward& p) {
  auto* starts = static_cast<int32_t*>(p.scratch);
  auto* order = starts + p.vocab + 1;
  std::fill(starts, starts + p.vocab + 1, 0);
  for (int64_t t = 0; t < p.num_tokens; ++t) ++starts[p.ids[t]];
  std::exclusive_scan(starts, starts + p.vocab + 1, starts, 0);
  for (int64_t t = 0; t < p.num_tokens; ++t) order[starts[p.ids[t]]++] = static_cast<int32_t>(t);
  // Each start now stands at its run's end: shift them back by one.
  std::copy_backward(starts, starts + p.vocab, starts + p.vocab + 1);
  starts[0] = 0;
  return {starts, order};
}

template <typename T, typename G>
DSV3_INLINE void backward_body(const EmbeddingBackward& p, const Runs& runs, int64_t begin,
                               int64_t end) {
  float sum[kColumns];
  const int64_t D = p.hidden;
  for (int64_t id = 0; id < p.vocab; ++id) {
    if (runs.starts[id] == runs.starts[id + 1]) continue;
    for (int64_t column = begin; column < end; column += kColumns) {
      const int64_t n = std::min(kColumns, end - column);
      for (int64_t d = 0; d < n; ++d) sum[d] = 0.0f;
      for (int32_t i = runs.starts[id]; i < runs.starts[id + 1]; ++i) {
        const T* __restrict dy = static_cast<const T*>(p.dy) + runs.order[i] * D + column;
#pragma omp simd
        for (int64_t d = 0; d < n; ++d) sum[d] += load(&dy[d]);
      }
      G* __restrict grad = static_cast<G*>(p.dtable) + id * D + column;
#pragma omp simd
      for (int64_t d = 0; d < n; ++d) store(&grad[d], load(&grad[d]) + sum[d]);
    }
  }
}

#define DSV3_EMBEDDING_COLUMNS(T, G)                                                        \
  DSV3_CLONES void backward_columns(const EmbeddingBackward& p, const Runs& runs, const T*, \
                                    const G*, int64_t begin, int64_t end) {                 \
    backward_body<T, G>(p, runs, begin, end);                                               \
  }
DSV3_EMBEDDING_COLUMNS(float, float)
DSV3_EMBEDDING_COLUMNS(float, BFloat16)
DSV3_EMBEDDING_COLUMNS(BFloat16, float)
DSV3_EMBEDDING_COLUMNS(BFloat16, BFloat16)
#undef DSV3_EMBEDDING_COLUMNS

}  // namespace

void embedding_forward(const EmbeddingForward& p) {
  check_ids(p.ids, p.num_tokens, p.vocab);
  const int64_t bytes = p.hidden * size_of(p.dtype);
  const auto* table = static_cast<const char*>(p.table);
  auto* y = static_cast<char*>(p.y);
  detail::parallel_rows(p.num_tokens, 2 * bytes, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      std::memcpy(y + t * bytes, table + p.ids[t] * bytes, bytes);
  });
}

void embedding_backward(const EmbeddingBackward& p) {
  check_ids(p.ids, p.num_tokens, p.vocab);
  if (p.num_tokens == 0) return;
  const Runs runs = sort_by_id(p);
  const int64_t groups = (p.hidden + kColumns - 1) / kColumns;
  detail::dispatch_float("embedding_backward", p.dtype, [&](auto* type) {
    detail::dispatch_float("embedding_backward", p.dtable_dtype, [&](auto* grad) {
      detail::parallel_rows(groups, p.num_tokens * kColumns * size_of(p.dtype),
                            [&](int64_t begin, int64_t end) {
                              backward_columns(p, runs, type, grad, begin * kColumns,
                                               std::min(end * kColumns, p.hidden));
                            });
    });
  });
}

}  // namespace cpu
}  // namespace dsv3::kernels
