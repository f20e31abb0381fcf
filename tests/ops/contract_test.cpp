// What all operators keep: the dtypes they take, the devices, memory that they share with others,
// autocast, second derivatives.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/gate.h"
#include "ops/latent_cache.h"
#include "ops/linear.h"
#include "ops/permute.h"
#include "ops/quantize.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/router.h"
#include "ops/split_cross_entropy.h"
#include "ops/swiglu.h"
#include "support/gradients.h"

namespace dsv3::ops {
namespace {

using test::same_bits;

constexpr int64_t kTokens = 6, kWidth = 8;
constexpr double kEps = 1e-6;

at::Tensor ones(at::IntArrayRef sizes, at::ScalarType type = at::kFloat) {
  return at::ones(sizes, type);
}
at::Tensor positions() {
  return at::zeros({kTokens}, at::kInt);
}
Permutation permutation() {
  return make_permutation(at::zeros({kTokens, 1}, at::kInt), 2);
}

struct Operator {
  const char* name;
  std::function<void(const at::Tensor& x)> call;  // x [kTokens, kWidth]
};

/// Every operator that has a kernel and a reference, on an input of any dtype.
std::vector<Operator> operators() {
  const auto heads = [](const at::Tensor& x) { return x.view({kTokens, 2, kWidth / 2}); };
  const auto weight = [](const at::Tensor& x) {
    return Weight{ones({kWidth}, x.scalar_type()), {}};
  };
  return {
      {"rms_norm", [=](const at::Tensor& x) { rms_norm(x, weight(x), kEps); }},
      {"add_rms_norm", [=](const at::Tensor& x) { add_rms_norm(x, x, weight(x), kEps); }},
      {"rms_norm_pair", [=](const at::Tensor& x) { rms_norm_pair(x, weight(x), weight(x), kEps); }},
      {"swiglu", [](const at::Tensor& x) { swiglu(x); }},
      {"weighted_swiglu", [](const at::Tensor& x) { weighted_swiglu(x, ones({kTokens})); }},
      {"rope_query",
       [=](const at::Tensor& x) {
         rope_query(heads(x), ones({3, 4}), positions());
       }},
      {"rope_query",
       [=](const at::Tensor& x) {
         rope_query_(heads(x), ones({3, 4}), positions());
       }},
      {"rope_key_value",
       [=](const at::Tensor& x) {
         rope_key_value(heads(x), x.narrow(1, 0, 2), ones({3, 2}), positions(), 1);
       }},
      {"embedding",
       [](const at::Tensor& x) {
         embedding(positions(), {x, {}});
       }},
      {"permute", [](const at::Tensor& x) { permute(x, permutation()); }},
      {"combine",
       [](const at::Tensor& x) {
         combine(x, ones({kTokens, 1}), permutation(), {});
       }},
      {"cross_entropy", [](const at::Tensor& x) { cross_entropy_(x, positions(), ones({})); }},
      {"head_cross_entropy",
       [](const at::Tensor& x) {
         head_cross_entropy(x, {x, {}}, positions(), ones({}));
       }},
      {"vocab_statistics",
       [](const at::Tensor& x) {
         vocab_statistics(x, positions(), {.begin = 0, .total = kWidth});
       }},
  };
}

/// What `call` throws as std::invalid_argument, "" where it throws nothing.
std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(Contract, OtherDtypesAreRefusedByName) {
  for (const auto& [name, call] : operators()) {
    for (const auto type : {at::kHalf, at::kInt, at::kFloat8_e4m3fn}) {
      const at::Tensor x = at::empty({kTokens, kWidth}, type);
      const std::string expected =
          std::string("expected dtype Float, BFloat16 or Double, got ") + c10::toString(type);
      const std::string text = refusal([&, &call = call] { call(x); });
      EXPECT_EQ(text.rfind("[" + std::string(name) + "] ", 0), 0u) << name << ": " << text;
      EXPECT_NE(text.find(expected), std::string::npos) << text;
    }
  }
}

TEST(Contract, OtherDevicesAreRefused) {
  const auto on_meta = at::TensorOptions(at::kFloat).device(at::kMeta);
  const at::Tensor x = at::empty({kTokens, kWidth}, on_meta), here = ones({kTokens, kWidth});
  EXPECT_EQ(refusal([&] { swiglu(x); }), "a tensor is on meta: operators run on cpu and cuda");
  EXPECT_NE(refusal([&] { rms_norm(here, {at::empty({kWidth}, on_meta), {}}, kEps); }), "");
  Permutation other = permutation();
  other.row_of = at::empty({kTokens, 1}, on_meta.dtype(at::kInt));
  EXPECT_NE(refusal([&] { permute(here, other); }), "");
  EXPECT_NE(refusal([&] { combine(here, ones({kTokens, 1}), other, {}); }), "");
  EXPECT_NE(refusal([&] { permute_fp8(quantize_rows(here, {}), other); }), "");
}

TEST(Contract, AutocastChoosesNoDtype) {
  test::Random random(1);
  const at::Tensor x = random.normal({kTokens, kWidth}, at::kFloat);
  const at::Tensor w = random.normal({3, kWidth}, at::kFloat);
  const auto run = [&] {
    const Weight weight = test::weight_of(w, at::kFloat, at::kCPU, at::kFloat);
    const at::Tensor leaf = test::leaf(x, at::kFloat);
    const at::Tensor logits = gate({leaf, {}}, weight), y = linear(leaf, weight);
    torch::autograd::backward({logits, y}, {ones({kTokens, 3}), ones({kTokens, 3})});
    return std::vector<at::Tensor>{logits, y, leaf.grad(), weight.grad};
  };
  const auto plain = run();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto cast = run();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  for (size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(same_bits(cast[i], plain[i])) << i;
}

TEST(Contract, ASecondDerivativeIsRefusedNotZero) {
  test::Random random(2);
  const at::Tensor x = test::leaf(random.normal({kTokens, kWidth}, at::kFloat), at::kFloat);
  const Weight weight{ones({kWidth}), {}};
  // The sum has another way to x, so that a constant gradient would go unnoticed.
  const at::Tensor y = rms_norm(x, weight, kEps).value.mul(x).sum();
  const at::Tensor dx = torch::autograd::grad({y}, {x}, {}, true, /*create_graph=*/true)[0];
  EXPECT_TRUE(dx.requires_grad());
  EXPECT_EQ(refusal([&] { torch::autograd::grad({dx.sum()}, {x}); }),
            "[rms_norm] its gradient cannot be differentiated: there is no second derivative");
}

TEST(Contract, WeightsMayBeStridedAndBucketsMayNot) {
  test::Random random(3);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = random.normal({kTokens, kWidth}, dtype);
    const at::Tensor w = random.normal({kWidth, 2}, dtype).select(1, 1), g = x.mul(2.0);
    const auto run = [&](const at::Tensor& value) {
      const at::Tensor leaf = test::leaf(x, dtype);
      const Weight weight{value.detach().requires_grad_(), at::zeros({kWidth})};
      const auto [first, second] = rms_norm_pair(leaf, weight, {value, {}}, kEps);
      test::backward({first.value, second.value}, {g, g});
      return std::vector<at::Tensor>{first.value, second.value, leaf.grad(), weight.grad};
    };
    const auto strided = run(w), packed = run(w.contiguous());
    for (size_t i = 0; i < packed.size(); ++i) EXPECT_TRUE(same_bits(strided[i], packed[i])) << i;
  }
  const at::Tensor x = test::leaf(ones({kTokens, kWidth}), at::kFloat);
  const Weight holes{ones({kWidth}), at::zeros({kWidth, 2}).select(1, 0)};
  EXPECT_EQ(refusal([&] { rms_norm(x, holes, kEps).value.sum().backward(); }),
            "[rms_norm] weight gradient: expected a contiguous tensor on cpu");
}

TEST(Contract, RotatingInPlaceSparesTokensThatShareMemory) {
  test::Random random(4);
  const at::Tensor one = random.normal({1, 2, 4}, at::kFloat), before = one.clone();
  const at::Tensor table = random.normal({9, 4}, at::kFloat);
  const at::Tensor where = random.integers({5}, 9), q = one.expand({5, 2, 4});
  EXPECT_TRUE(same_bits(rope_query_(q, table, where), rope_query(q.contiguous(), table, where)));
  EXPECT_TRUE(same_bits(one, before));
}

TEST(Contract, GroupsThatDoNotFitTheRowsAreRefusedOnTheHost) {
  const at::Tensor x = ones({10, 16});
  const auto ends = [](int32_t first, int32_t second) {
    return RowGroups{at::stack({at::full({}, first, at::kInt), at::full({}, second, at::kInt)})};
  };
  EXPECT_EQ(refusal([&] { quantize_rows(x, {}, ends(5, 11)); }),
            "[quantize_rows] ends[1]: expected 5 to 10 (ascending, at most the rows of x), got 11");
  EXPECT_NE(refusal([&] { quantize_both(x, {}, ends(8, 3)); }), "");
  EXPECT_NE(refusal([&] { quantize_columns(x, {}, ends(-1, 3)); }), "");
  EXPECT_EQ(refusal([&] { quantize_rows(x, {}, ends(2, 3)); }), "") << "rows may stay out";
}

TEST(Contract, TheFp8CacheKeepsItsScalesAligned) {
  const at::Tensor latent = ones({2, 128}), slots = at::zeros({2}, at::kInt);
  const auto cache = [](int64_t bytes) { return at::zeros({1, 4, bytes}, at::kByte); };
  EXPECT_NE(refusal([&] { latent_cache_write(latent, ones({2, 3}), slots, cache(138)); }), "");
  const at::Tensor shifted = at::zeros({1 + 4 * 136}, at::kByte).narrow(0, 1, 4 * 136);
  EXPECT_EQ(refusal([&] {
              latent_cache_write(latent, ones({2, 2}), slots, shifted.view({1, 4, 136}));
            }),
            "[latent_cache_write] cache: expected memory aligned to 4 bytes");
}

TEST(Contract, APartOfTheVocabularyMayBeEmptyButNotAllOfThem) {
  test::Random random(5);
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const at::Tensor labels = random.integers({kTokens}, kWidth);
    const at::Tensor whole = random.normal({kTokens, kWidth}, dtype), none = whole.narrow(1, 0, 0);
    const VocabPart first{.begin = 0, .total = kWidth}, behind{.begin = kWidth, .total = kWidth};
    const at::Tensor empty = none.contiguous();
    const at::Tensor all = at::stack(
        {vocab_statistics(whole, labels, first), vocab_statistics(empty, labels, behind)});
    const at::Tensor expected = reference::cross_entropy(whole.to(at::kDouble), labels);
    const at::Tensor scale = ones({}, dtype);
    for (const auto& [part, place] : {std::pair(whole, first), std::pair(empty, behind)}) {
      const TokenLosses actual = finish_cross_entropy_(part, labels, place, all, scale, true);
      EXPECT_TRUE(test::close(actual.losses, expected, 1e-6));
    }
    EXPECT_NE(refusal([&] {
                finish_cross_entropy_(whole, labels, first, all.narrow(0, 0, 0), scale, true);
              }),
              "");
  }
}

TEST(Contract, LabelsAreCheckedInFloat64Too) {
  const at::Tensor logits = ones({2, 4}, at::kDouble), scale = ones({}, at::kDouble);
  for (const int bad : {-5, 4}) {
    const at::Tensor labels = at::full({2}, bad, at::kInt);
    EXPECT_NE(refusal([&] { cross_entropy_(logits.clone(), labels, scale); }), "") << bad;
  }
}

}  // namespace
}  // namespace dsv3::ops
