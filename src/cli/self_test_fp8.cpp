// Self-tests of FP8: bit by bit against the plain form, so that each pair must be equal.
#include <ATen/ops/zeros.h>

#include "cli/self_test.h"
#include "ops/latent_cache.h"
#include "ops/quantize.h"
#include "ops/rms_norm.h"
#include "ops/rms_norm_fp8.h"
#include "ops/swiglu.h"
#include "ops/swiglu_fp8.h"

namespace dsv3::cli {
namespace {

constexpr int64_t kTokens = 150, kWidth = 200;

/// Codes compare as integers.
template <typename Tiles>
void add(SelfTestPairs& pairs, const Tiles& got, const Tiles& expected) {
  pairs.emplace_back(got.data.view(at::kByte), expected.data.view(at::kByte));
  pairs.emplace_back(got.scales, expected.scales);
}

SelfTestPairs test_quantize(SelfTestSetup& setup) {
  const at::Tensor x = setup.normal({kTokens, kWidth}).to(setup.dtype), moved = setup.move(x);
  SelfTestPairs pairs;
  for (const bool power_of_two : {false, true}) {
    const ops::QuantizeOptions options{.power_of_two = power_of_two};
    const auto both = ops::quantize_both(moved, options);
    add(pairs, both.first, ops::reference::quantize_rows(x, options));
    add(pairs, both.second, ops::reference::quantize_columns(x, options));
    add(pairs, ops::quantize_blocks(moved, options), ops::reference::quantize_blocks(x, options));
  }
  return pairs;
}

SelfTestPairs test_requantize(SelfTestSetup& setup) {
  const at::Tensor x = setup.normal({kTokens, kWidth}).to(setup.dtype);
  const auto rows = ops::quantize_rows(setup.move(x), {});
  const at::Tensor wide =
      ops::reference::dequantize(ops::reference::quantize_rows(x, {}), at::kFloat);
  SelfTestPairs pairs = {{ops::dequantize(rows, at::kFloat), wide}};
  add(pairs, ops::requantize_columns(rows, {}), ops::reference::quantize_columns(wide, {}));
  return pairs;
}

SelfTestPairs test_norm_and_swiglu(SelfTestSetup& setup) {
  const at::Tensor x = setup.move(setup.normal({kTokens, 2 * kWidth}).to(setup.dtype));
  const ops::Weight weight{setup.move(setup.normal({2 * kWidth}).to(setup.dtype)), {}};
  SelfTestPairs pairs;
  add(pairs, ops::rms_norm_fp8(x, weight, 1e-6, {}).tiles,
      ops::quantize_rows(ops::rms_norm(x, weight, 1e-6).value, {}));
  const auto fused = ops::swiglu_fp8(x, {}, {});
  const at::Tensor y = ops::swiglu(x).value;
  add(pairs, fused.rows, ops::quantize_rows(y, {}));
  add(pairs, fused.columns, ops::quantize_columns(y, {}));
  return pairs;
}

SelfTestPairs test_latent_cache_write(SelfTestSetup& setup) {
  const at::Tensor latent = setup.normal({21, 512}).to(setup.dtype);
  const at::Tensor rope = setup.normal({21, 64}).to(setup.dtype);
  at::Tensor slots = setup.integers({21}, 6);
  for (int64_t t = 0; t < 21; ++t) slots.data_ptr<int32_t>()[t] += static_cast<int32_t>(6 * t) - 6;
  SelfTestPairs pairs;
  for (const bool fp8 : {false, true}) {
    const at::Tensor expected =
        at::zeros({2, 64, fp8 ? 656 : 576}, fp8 ? at::kByte : at::kBFloat16);
    const at::Tensor got = setup.move(expected).clone();
    ops::latent_cache_write(setup.move(latent), setup.move(rope), setup.move(slots), got);
    ops::reference::latent_cache_write(latent, rope, slots, expected);
    pairs.emplace_back(got, expected);
  }
  return pairs;
}

}  // namespace

std::vector<SelfTest> fp8_self_tests() {
  return {{"quantize_fp8", test_quantize},
          {"requantize_fp8", test_requantize},
          {"norm_swiglu_fp8", test_norm_and_swiglu},
          {"latent_cache_write", test_latent_cache_write}};
}

}  // namespace dsv3::cli
