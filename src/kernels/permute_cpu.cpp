// Rows to expert order and back on the host: tokens are shared between threads, inner loops run
// along a row.

#include "kernels/detail/cpu.h"
#include "kernels/detail/lanes.h"
#include "kernels/detail/permutation.h"
#include "kernels/routing.h"

namespace dsv3::kernels {

void detail::check_permute(const PermuteForward& p) {
  require(p.dtype == DType::kF32 || p.dtype == DType::kBF16 || p.dtype == DType::kF8E4M3,
          "[permute] dtype: expected fp32, bf16 or fp8_e4m3, got {}", name_of(p.dtype));
  require(p.num_experts_per_token >= 1 && p.num_experts_per_token <= kMaxChoices,
          "[permute] row_of: expected [T, 1 to {}], got [T, {}]", kMaxChoices,
          p.num_experts_per_token);
}

namespace cpu {
namespace {

using namespace detail;

template <typename T>
DSV3_INLINE void combine_rows(const CombineForward& p, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 512;
  float acc[kTile];
  const int64_t hidden = p.hidden, num_choices = p.num_experts_per_token;
  const auto* rows = static_cast<const T*>(p.rows);
  const auto* base = static_cast<const T*>(p.base);
  for (int64_t t = begin; t < end; ++t) {
    T* const y = static_cast<T*>(p.y) + t * hidden;
    for (int64_t first = 0; first < hidden; first += kTile) {
      const int64_t size = std::min(kTile, hidden - first);
      if (base == nullptr) {
        std::fill_n(acc, size, 0.0f);
      } else {
        for (int64_t i = 0; i < size; ++i) acc[i] = load(base + t * hidden + first + i);
      }
      for (int64_t k = 0; k < num_choices; ++k) {
        const int64_t choice = t * num_choices + k;
        const float weight = p.weights == nullptr ? 1.0f : p.weights[choice];
        const T* const x = rows + p.row_of[choice] * hidden + first;
        for (int64_t i = 0; i < size; ++i) acc[i] += weight * load(x + i);
      }
      for (int64_t i = 0; i < size; ++i) store(y + first + i, acc[i]);
    }
  }
}

template <typename T>
DSV3_INLINE void combine_backward_rows(const CombineBackward& p, int64_t begin, int64_t end) {
  const int64_t hidden = p.hidden, num_choices = p.num_experts_per_token;
  for (int64_t choice = begin * num_choices; choice < end * num_choices; ++choice) {
    const int64_t row = p.row_of[choice];
    const T* const __restrict dy = static_cast<const T*>(p.dy) + choice / num_choices * hidden;
    if (p.drows != nullptr) {
      T* const __restrict dx = static_cast<T*>(p.drows) + row * hidden;
      const float weight = p.weights[choice];
      for (int64_t i = 0; i < hidden; ++i) store(dx + i, weight * load(dy + i));
    }
    if (p.dweights != nullptr) {
      p.dweights[choice] = dot_rows(dy, static_cast<const T*>(p.rows) + row * hidden, hidden);
    }
  }
}

DSV3_CLONES void combine_f32(const CombineForward& p, int64_t begin, int64_t end) {
  combine_rows<float>(p, begin, end);
}
DSV3_CLONES void combine_bf16(const CombineForward& p, int64_t begin, int64_t end) {
  combine_rows<BFloat16>(p, begin, end);
}
DSV3_CLONES void combine_backward_f32(const CombineBackward& p, int64_t begin, int64_t end) {
  combine_backward_rows<float>(p, begin, end);
}
DSV3_CLONES void combine_backward_bf16(const CombineBackward& p, int64_t begin, int64_t end) {
  combine_backward_rows<BFloat16>(p, begin, end);
}

/// Scales follow their rows, times the weights; padding rows get 0.
void permute_scales(const PermuteForward& p, int64_t num_rows) {
  const int64_t num_choices = p.num_tokens * p.num_experts_per_token;
  for (int64_t g = 0; g < p.num_scales; ++g) {
    const float* const x = p.x_scales + g * p.x_scale_stride;
    float* const y = p.y_scales + g * p.y_scale_stride;
    if (num_rows > num_choices) std::fill_n(y, num_rows, 0.0f);
    for (int64_t choice = 0; choice < num_choices; ++choice) {
      const float weight = p.weights == nullptr ? 1.0f : p.weights[choice];
      y[p.row_of[choice]] = x[choice / p.num_experts_per_token] * weight;
    }
  }
}

/// Zeros over the rows of `row_bytes` bytes that hold no choice.
void clear_padding(void* rows, const int32_t* choice_of, int64_t num_rows, int64_t num_choices,
                   int64_t row_bytes) {
  if (num_rows <= num_choices) return;
  for (int64_t row = 0; row < num_rows; ++row) {
    if (choice_of[row] < 0) {
      std::memset(static_cast<char*>(rows) + row * row_bytes, 0, static_cast<size_t>(row_bytes));
    }
  }
}

}  // namespace

void permute_forward(const PermuteForward& p) {
  kernels::detail::check_permute(p);
  const int64_t row_bytes = p.hidden * size_of(p.dtype), num_choices = p.num_experts_per_token;
  const auto* x = static_cast<const char*>(p.x);
  auto* y = static_cast<char*>(p.y);
  parallel_rows(p.num_tokens, (num_choices + 1) * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t choice = begin * num_choices; choice < end * num_choices; ++choice) {
      std::memcpy(y + p.row_of[choice] * row_bytes, x + choice / num_choices * row_bytes,
                  static_cast<size_t>(row_bytes));
    }
  });
  clear_padding(p.y, p.choice_of, p.num_rows, p.num_tokens * num_choices, row_bytes);
  permute_scales(p, std::max(p.num_rows, p.num_tokens * num_choices));
}

void combine_forward(const CombineForward& p) {
  dispatch_float("combine", p.dtype, [](auto*) {});
  const auto body = p.dtype == DType::kF32 ? combine_f32 : combine_bf16;
  const int64_t bytes = (p.num_experts_per_token + 2) * p.hidden * size_of(p.dtype);
  parallel_rows(p.num_tokens, bytes, [&](int64_t begin, int64_t end) { body(p, begin, end); });
}

void combine_backward(const CombineBackward& p) {
  dispatch_float("combine_backward", p.dtype, [](auto*) {});
  const auto body = p.dtype == DType::kF32 ? combine_backward_f32 : combine_backward_bf16;
  if (p.drows != nullptr) {
    clear_padding(p.drows, p.choice_of, p.num_rows, p.num_tokens * p.num_experts_per_token,
                  p.hidden * size_of(p.dtype));
  }
  const int64_t bytes = 3 * p.num_experts_per_token * p.hidden * size_of(p.dtype);
  parallel_rows(p.num_tokens, bytes, [&](int64_t begin, int64_t end) { body(p, begin, end); });
}

}  // namespace cpu
}  // namespace dsv3::kernels
