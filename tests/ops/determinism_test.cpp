// Every kernel gives the same bits on each of ten runs; on the host with one to four threads too,
// among whom the work is cut differently. LibTorch's own products, which the gate and the head
// call, keep their bits for one number of threads only.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "kernels/optimizer.h"
#include "ops/cross_entropy.h"
#include "ops/dispatch.h"
#include "ops/embedding.h"
#include "ops/gate.h"
#include "ops/gate_split.h"
#include "ops/latent_cache.h"
#include "ops/normal.h"
#include "ops/permute.h"
#include "ops/quantize.h"
#include "ops/rms_norm.h"
#include "ops/rms_norm_fp8.h"
#include "ops/rope.h"
#include "ops/router.h"
#include "ops/split_cross_entropy.h"
#include "ops/swiglu.h"
#include "ops/swiglu_fp8.h"
#include "support/gradients.h"

namespace dsv3::ops {
namespace {

using test::leaf;
using Results = std::vector<at::Tensor>;

constexpr double kEps = 1e-6;
// Rows enough that the host's threads share them, and no multiple of a vector or a tile.
constexpr int64_t kTokens = 1501, kWidth = 515;

class Determinism : public ::testing::TestWithParam<test::Place> {
 protected:
  at::Tensor draw(at::IntArrayRef sizes) { return random_.normal(sizes, type(), device()); }
  at::Tensor draw32(at::IntArrayRef sizes) { return random_.normal(sizes, at::kFloat, device()); }
  at::Tensor ids(at::IntArrayRef sizes, int64_t end) {
    return random_.integers(sizes, end, device());
  }
  /// A leaf that requires a gradient, with a bucket of its own.
  Weight weight(const at::Tensor& value) const {
    return test::weight_of(value, value.scalar_type(), device(), at::kFloat);
  }
  at::Tensor fresh(const at::Tensor& x) const { return leaf(x, x.scalar_type(), device()); }
  at::Tensor scalar(double value) const {
    return at::full({}, value, at::TensorOptions(at::kFloat).device(device()));
  }
  at::Device device() const { return GetParam().device; }
  at::ScalarType type() const { return GetParam().dtype; }

  void expect_same_bits(const std::function<Results()>& run, bool with_products = false) {
    SCOPED_TRACE(test::seed_text(seed_));
    const int before = at::get_num_threads();
    Results first;
    for (int i = 0; i < 10; ++i) {
      if (!with_products) at::set_num_threads(i % 4 + 1);
      const Results now = run();
      if (i == 0) first = now;
      for (size_t k = 0; k < now.size(); ++k) {
        EXPECT_TRUE(test::same_bits(now[k], first[k])) << "result " << k << " of run " << i;
      }
    }
    at::set_num_threads(before);
  }

 private:
  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};
};

/// FP8 codes as bytes, and their scales.
template <typename Tiles>
void add(Results& results, const Tiles& tiles) {
  results.push_back(tiles.data.view(at::kByte));
  results.push_back(tiles.scales);
}

TEST_P(Determinism, Norms) {
  const at::Tensor x = draw({kTokens, kWidth}), r = draw({kTokens, kWidth});
  const at::Tensor dy = draw({kTokens, kWidth}), w = draw({kWidth}), v = draw({kWidth});
  expect_same_bits([&]() -> Results {
    const at::Tensor a = fresh(x), b = fresh(x), c = fresh(x);
    const Weight first = weight(w), second = weight(v), third = weight(w), fourth = weight(v);
    const at::Tensor y = rms_norm(a, first, kEps).value;
    const auto [sum, z] = add_rms_norm(b, r, second, kEps);
    const auto [p, q] = rms_norm_pair(c, third, fourth, kEps);
    test::backward({y, sum, z.value, p.value, q.value}, {dy, r, dy, dy, r});
    Results results{y,        sum,      z.value,    p.value,     q.value,    a.grad(),
                    b.grad(), c.grad(), first.grad, second.grad, third.grad, fourth.grad};
    add(results, rms_norm_fp8(x, {w, {}}, kEps, {}).tiles);
    return results;
  });
}

TEST_P(Determinism, Swiglu) {
  const at::Tensor x = draw({kTokens, 2 * kWidth}), dy = draw({kTokens, kWidth});
  const at::Tensor tiled = draw({300, 2 * 384}), dtiled = draw({300, 384});
  const at::Tensor w = draw32({kTokens}), tiled_w = draw32({300});
  expect_same_bits([&]() -> Results {
    const at::Tensor a = fresh(x), b = fresh(x), share = fresh(w);
    const at::Tensor y = swiglu(a).value, z = weighted_swiglu(b, share).value;
    test::backward({y, z}, {dy, dy});
    Results results{y, z, a.grad(), b.grad(), share.grad()};
    const SwigluFp8 forward = swiglu_fp8(tiled, tiled_w, {});
    const SwigluGradientFp8 back = swiglu_gradient_fp8(dtiled, tiled, tiled_w, {});
    add(results, forward.rows), add(results, forward.columns);
    add(results, back.rows), add(results, back.columns);
    results.push_back(back.drow_weight);
    return results;
  });
}

TEST_P(Determinism, Rotation) {
  const at::Tensor table = draw32({300, 16}), where = ids({kTokens}, 300);
  const at::Tensor q = draw({kTokens, 4, 40}), kv = draw({kTokens, 4, 56});
  const at::Tensor shared = draw({kTokens, 16}), dv = draw({kTokens, 4, 32});
  expect_same_bits([&]() -> Results {
    const at::Tensor a = fresh(q), b = fresh(kv), c = fresh(shared);
    const at::Tensor y = rope_query(a, table, where);
    const auto [k, v] = rope_key_value(b, c, table, where, 32);
    const at::Tensor in_place = rope_query_(q.clone(), table, where);
    test::backward({y, k, v}, {q, q, dv});
    return {y, k, v, in_place, a.grad(), b.grad(), c.grad()};
  });
}

TEST_P(Determinism, Quantisation) {
  const at::Tensor x = draw({kTokens, kWidth}), latent = draw({70, 512}), rope = draw({70, 64});
  const at::Tensor ends = ids({3}, 500).cumsum(0).to(at::kInt);
  const at::Tensor slots = at::ones({70}, ends.options()).cumsum(0).to(at::kInt);
  expect_same_bits([&]() -> Results {
    const auto [rows, columns] = quantize_both(x, {}, {ends});
    const Fp8RowTiles plain = quantize_rows(x, {});
    const Fp8BlockTiles blocks = quantize_blocks(x, {.power_of_two = true});
    Results results{dequantize(rows, type()), dequantize(columns, type(), kTokens),
                    dequantize(blocks, type())};
    add(results, rows), add(results, columns), add(results, plain), add(results, blocks);
    add(results, requantize_columns(plain, {}));
    for (const auto cache_type : {at::kByte, at::kBFloat16}) {
      const int64_t width = cache_type == at::kByte ? 656 : 576;
      results.push_back(at::zeros({2, 64, width}, x.options().dtype(cache_type)));
      latent_cache_write(latent, rope, slots, results.back());
    }
    return results;
  });
}

TEST_P(Determinism, Router) {
  const at::Tensor logits = draw32({kTokens - 1, 64}), bias = draw32({64});
  const RouterOptions options{
      .num_experts = 64, .num_experts_per_token = 6, .n_group = 8, .topk_group = 4};
  expect_same_bits([&]() -> Results {
    const at::Tensor a = fresh(logits);
    const Routing r = route(a, bias, options, {.num_sequences = 3, .valid = {}});
    test::backward({r.weights, r.balance_loss}, {r.weights.detach(), scalar(0.5)});
    return {r.experts, r.weights, r.scores, r.counts, r.balance_loss, split_gradient(logits),
            a.grad()};
  });
}

TEST_P(Determinism, GateAndHead) {
  const at::Tensor x = draw({kTokens, 96}), w = draw32({64, 96}), dlogits = draw32({kTokens, 64});
  const at::Tensor head = draw({kWidth, 96}), labels = ids({kTokens}, kWidth);
  expect_same_bits(
      [&]() -> Results {
        const at::Tensor a = fresh(x), b = fresh(x);
        const Weight gate_weight = weight(w), head_weight = weight(head);
        const at::Tensor logits = gate({a, {}}, gate_weight);
        test::backward({logits}, {dlogits});
        const HeadLoss loss = head_cross_entropy(b, head_weight, labels, scalar(0.01));
        loss.objective.backward();
        return {logits, a.grad(), gate_weight.grad, loss.objective, b.grad(), head_weight.grad};
      },
      /*with_products=*/true);
}

TEST_P(Determinism, Permutation) {
  const at::Tensor experts = ids({kTokens, 3}, 16), x = draw({kTokens, kWidth});
  const at::Tensor w = draw32({kTokens, 3}), dy = draw({kTokens, kWidth});
  expect_same_bits([&]() -> Results {
    const struct Permutation p = make_permutation(experts, 16, 16);
    const at::Tensor a = fresh(x), b = fresh(w), base = fresh(x);
    const at::Tensor rows = permute(a, p), y = combine(rows, b, p, base);
    test::backward({y}, {dy});
    Results results{p.counts, p.offsets, p.row_of, p.choice_of, rows,
                    y,        a.grad(),  b.grad(), base.grad()};
    add(results, permute_fp8(quantize_rows(x, {}), p, w));
    return results;
  });
}

TEST_P(Determinism, EmbeddingAndLoss) {
  const at::Tensor words = ids({kTokens}, 50), table = draw({50, kWidth});
  const at::Tensor logits = draw({kTokens, kWidth}), labels = ids({kTokens}, kWidth);
  expect_same_bits([&]() -> Results {
    const Weight rows = weight(table);
    const at::Tensor y = embedding(words, rows);
    test::backward({y}, {logits});
    const at::Tensor start = fresh(logits);
    const HeadLoss direct = cross_entropy_(start.mul(1.0), labels, scalar(0.01));
    direct.objective.backward();
    const at::Tensor part = logits.clone();
    const VocabPart whole{.begin = 0, .total = kWidth};
    const at::Tensor statistics = vocab_statistics(part, labels, whole);
    const TokenLosses split =
        finish_cross_entropy_(part, labels, whole, statistics.unsqueeze(0), scalar(0.01), true);
    return {
        y,   rows.grad, direct.objective, direct.correct, start.grad(), statistics, split.losses,
        part};
  });
}

TEST_P(Determinism, Optimizer) {
  constexpr int64_t kRows = 300, kColumns = 700, kSize = kRows * kColumns;
  const at::Tensor w = draw({kSize}), g = draw({kSize}), m = draw({kSize}), mean = draw32({kSize});
  const at::Tensor v = draw({kSize}).abs();
  const auto options = at::TensorOptions(at::kDouble).device(device());
  for (const bool random : {false, true}) {
    expect_same_bits([&]() -> Results {
      const Results state{w.clone(), m.clone(), v.clone(), mean.clone()};
      const at::Tensor moved = at::zeros({kernels::adamw_partials(kSize), 2}, options);
      const at::Tensor scratch = at::empty({kernels::kSumOfSquaresPartials}, options);
      const at::Tensor sum = at::empty({1}, options), normal = at::empty({kSize}, w.options());
      const at::Tensor codes = at::empty({kRows, kColumns}, options.dtype(at::kByte));
      const at::Tensor scales = at::empty({3, 6}, options.dtype(at::kFloat));
      const DType dtype = dtype_of(w, "adamw", "weights");
      const Stream stream = stream_of(w);
      kernels::sum_of_squares({.size = kSize,
                               .dtype = dtype,
                               .x = g.const_data_ptr(),
                               .partials = scratch.mutable_data_ptr<double>(),
                               .result = sum.mutable_data_ptr<double>()},
                              stream);
      kernels::AdamW p{.size = kSize,
                       .weight_dtype = dtype,
                       .gradient_dtype = dtype,
                       .moment_dtype = dtype,
                       .weights = state[0].mutable_data_ptr(),
                       .master = nullptr,
                       .gradients = g.mutable_data_ptr(),
                       .exp_avg = state[1].mutable_data_ptr(),
                       .exp_avg_sq = state[2].mutable_data_ptr(),
                       .learning_rate = 0.01f,
                       .beta1 = 0.9f,
                       .beta2 = 0.95f,
                       .eps = 1e-8f,
                       .weight_decay = 0.1f,
                       .correction1 = 0.1f,
                       .correction2 = 0.05f,
                       .gradient_scale = nullptr,
                       .skip = nullptr,
                       .zero_gradients = false,
                       .decay_end = kSize / 3,
                       .ema = state[3].mutable_data_ptr(),
                       .ema_decay = 0.99f,
                       .stochastic_rounding = random,
                       .partials = moved.mutable_data_ptr<double>()};
      kernels::adamw(p, stream);
      Results results = state;
      for (auto& tensor : results) tensor = tensor.clone();
      p.partials = nullptr;
      kernels::adamw_fp8({.update = p,
                          .rows = kRows,
                          .columns = kColumns,
                          .codes = codes.mutable_data_ptr<uint8_t>(),
                          .scales = scales.mutable_data_ptr<float>(),
                          .scale_stride = 6,
                          .rule = {}},
                         stream);
      at::Tensor filled = normal;
      fill_normal(filled, 0.0, 1.0, 7, 8);
      results.insert(results.end(), state.begin(), state.end());
      results.insert(results.end(), {moved, sum, codes, scales, filled});
      return results;
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Places, Determinism, ::testing::ValuesIn(test::places()),
                         test::place_name);

}  // namespace
}  // namespace dsv3::ops
