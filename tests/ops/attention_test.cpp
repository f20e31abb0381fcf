#include "ops/attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <gtest/gtest.h>

#include "kernels/attention.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

using test::close;

struct Shape {
  int64_t sequences, length, heads, qk, v;
};

struct Gradients {
  at::Tensor out, q, k, v;
};

class Attention : public ::testing::TestWithParam<at::Device> {
 protected:
  at::Device device() const { return GetParam(); }

  AttentionInputs draw(const Shape& s, at::ScalarType dtype) {
    const int64_t tokens = s.sequences * s.length;
    const auto one = [&](int64_t dim) {
      return random.normal({tokens, s.heads, dim}, dtype, device());
    };
    return {one(s.qk), one(s.qk), one(s.v)};
  }

  AttentionOptions options(const Shape& s) const {
    return {.num_sequences = s.sequences,
            .scale = 1.3 / std::sqrt(double(s.qk)),
            .documents = {},
            .remake = {}};
  }

  /// Documents of random lengths, numbered from 0 in each sequence.
  at::Tensor documents(const Shape& s, int64_t longest) {
    at::Tensor ids = at::empty({s.sequences * s.length}, at::TensorOptions(at::kInt));
    auto* data = ids.mutable_data_ptr<int32_t>();
    for (int64_t sequence = 0; sequence < s.sequences; ++sequence) {
      int32_t id = 0;
      for (int64_t i = 0; i < s.length; ++id) {
        const int64_t end = std::min(s.length, i + random.integer(1, longest));
        for (; i < end; ++i) data[sequence * s.length + i] = id;
      }
    }
    return ids.to(device());
  }

  static at::Tensor leaf(const at::Tensor& x) { return x.detach().clone().requires_grad_(true); }

  template <typename Function>
  static Gradients run(Function function, const AttentionInputs& in, const AttentionOptions& o,
                       const at::Tensor& grad) {
    const AttentionInputs leaves{leaf(in.q), leaf(in.k), leaf(in.v)};
    const at::Tensor out = function(leaves, o);
    out.backward(grad);
    return {out.detach(), leaves.q.grad(), leaves.k.grad(), leaves.v.grad()};
  }

  static AttentionInputs doubles(const AttentionInputs& in) {
    return {in.q.to(at::kDouble), in.k.to(at::kDouble), in.v.to(at::kDouble)};
  }

  /// Relative error of dq or dk. Both are differences that cancel where a token sees little but
  /// itself (exactly to zero when alone), so their scale is at least a tenth of dv's.
  static double score_gradient_error(const at::Tensor& got, const at::Tensor& want,
                                     const at::Tensor& want_v) {
    const double scale = std::max(want.norm().item<double>(), 0.1 * want_v.norm().item<double>());
    return got.to(at::kDouble).sub(want).norm().item<double>() / scale;
  }

  /// The operator and the float64 reference from the same rounded inputs.
  void compare(const Shape& s, at::ScalarType dtype, const AttentionOptions& o) {
    SCOPED_TRACE(::testing::Message()
                 << "B " << s.sequences << " S " << s.length << " H " << s.heads << " heads "
                 << s.qk << "/" << s.v << " " << c10::toString(dtype)
                 << (o.documents.defined() ? " documents" : ""));
    const auto in = draw(s, dtype);
    const auto grad = random.normal({s.sequences * s.length, s.heads, s.v}, dtype, device());
    const auto got = run(attention, in, o, grad);
    const auto want = run(reference::attention, doubles(in), o, grad.to(at::kDouble));
    // FP32: sums of hundreds of terms, exponentials, and differences that cancel. BF16: the
    // probabilities, their gradient and the results are rounded; few elements average less.
    const double bf16 = got.out.numel() < 256 ? 2e-2 : 1e-2;
    const double most = dtype == at::kFloat ? 1e-5 : bf16;
    EXPECT_TRUE(got.out.is_contiguous());
    EXPECT_EQ(got.out.scalar_type(), dtype);
    EXPECT_TRUE(close(got.out, want.out, most));
    EXPECT_LE(score_gradient_error(got.q, want.q, want.v), most)
        << "dq " << test::worst_element(got.q, want.q);
    EXPECT_LE(score_gradient_error(got.k, want.k, want.v), most)
        << "dk " << test::worst_element(got.k, want.k);
    EXPECT_TRUE(close(got.v, want.v, most)) << "dv";
  }

  uint64_t seed = test::fresh_seed();
  test::Random random{seed};
  ::testing::ScopedTrace trace{__FILE__, __LINE__, test::seed_text(seed)};
};

TEST_P(Attention, AgreesWithTheFloat64Reference) {
  const Shape shapes[] = {{1, 1, 1, 8, 8},    {3, 2, 2, 5, 3},     {2, 63, 3, 24, 16},
                          {2, 65, 3, 24, 40}, {1, 130, 2, 48, 32}, {2, 200, 2, 192, 128},
                          {1, 257, 1, 17, 9}, {4, 64, 2, 64, 64},  {1, 300, 3, 96, 64}};
  for (const auto& shape : shapes) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) compare(shape, dtype, options(shape));
  }
}

TEST_P(Attention, AgreesOnShapesDrawnAtRandom) {
  for (int i = 0; i < 8; ++i) {
    const Shape shape{random.integer(1, 3), random.integer(1, 210), random.integer(1, 4),
                      random.integer(1, 80), random.integer(1, 80)};
    auto o = options(shape);
    if (i % 2 == 1) o.documents = documents(shape, shape.length);
    compare(shape, i % 4 < 2 ? at::kFloat : at::kBFloat16, o);
  }
}

TEST_P(Attention, MasksAcrossDocuments) {
  for (const int64_t longest : {1, 7, 90, 400}) {
    const Shape shape{2, 330, 2, 32, 16};
    auto o = options(shape);
    o.documents = documents(shape, longest);
    compare(shape, at::kFloat, o);
    compare(shape, at::kBFloat16, o);
  }
}

TEST_P(Attention, DocumentsNeedNotLieTogether) {
  const Shape shape{2, 150, 2, 16, 16};
  auto o = options(shape);
  o.documents = random.integers({300}, 3, device());
  compare(shape, at::kFloat, o);
}

TEST_P(Attention, ADocumentAloneGivesTheSame) {
  const Shape shape{1, 140, 2, 24, 16};
  const auto in = draw(shape, at::kFloat);
  auto o = options(shape);
  at::Tensor ids = at::empty({140}, at::TensorOptions(at::kInt));
  ids.narrow(0, 0, 75).fill_(4);
  ids.narrow(0, 75, 65).fill_(9);
  o.documents = ids.to(device());
  const auto together = attention(in, o);
  o.documents = at::Tensor();
  const auto part = [&](int64_t begin, int64_t length) {
    return attention({in.q.narrow(0, begin, length), in.k.narrow(0, begin, length),
                      in.v.narrow(0, begin, length)},
                     o);
  };
  EXPECT_TRUE(close(together.narrow(0, 0, 75), part(0, 75), 1e-6));
  EXPECT_TRUE(close(together.narrow(0, 75, 65), part(75, 65), 1e-6));
}

TEST_P(Attention, SurvivesLargeScores) {
  const Shape shape{1, 100, 2, 16, 16};
  auto in = draw(shape, at::kFloat);
  in.q.mul_(60.0);
  in.k.mul_(60.0);
  const auto out = attention(in, options(shape));
  const auto want = reference::attention(doubles(in), options(shape));
  EXPECT_TRUE(close(out, want, 1e-3));  // scores near 10^4: their own rounding is 10^-3
}

TEST_P(Attention, TakesStridedInputs) {
  const Shape shape{2, 70, 3, 24, 16};
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto fused = random.normal({140, 3, 24 + 16 + 24}, dtype, device());
    const AttentionInputs views{fused.narrow(2, 0, 24), fused.narrow(2, 40, 24),
                                fused.narrow(2, 24, 16)};
    const AttentionInputs copies{views.q.contiguous(), views.k.contiguous(), views.v.contiguous()};
    EXPECT_TRUE(
        test::same_bits(attention(views, options(shape)), attention(copies, options(shape))));
    const AttentionInputs turned{copies.q.transpose(1, 2).contiguous().transpose(1, 2), copies.k,
                                 copies.v};
    EXPECT_TRUE(
        test::same_bits(attention(turned, options(shape)), attention(copies, options(shape))));
  }
}

TEST_P(Attention, RemakesItsInputs) {
  const Shape shape{2, 90, 2, 32, 24};
  const auto in = draw(shape, at::kFloat);
  const auto grad = random.normal({180, 2, 24}, at::kFloat, device());
  auto o = options(shape);
  const auto kept = run(attention, in, o, grad);
  int calls = 0;
  o.remake = [&] {
    ++calls;
    return in;
  };
  const auto remade = run(attention, in, o, grad);
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(test::same_bits(remade.q, kept.q));
  EXPECT_TRUE(test::same_bits(remade.k, kept.k));
  EXPECT_TRUE(test::same_bits(remade.v, kept.v));
}

TEST_P(Attention, GivesTheSameBitsTwice) {
  const Shape shape{3, 200, 4, 48, 32};
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto in = draw(shape, dtype);
    const auto grad = random.normal({600, 4, 32}, dtype, device());
    const auto a = run(attention, in, options(shape), grad);
    const auto b = run(attention, in, options(shape), grad);
    EXPECT_TRUE(test::same_bits(a.out, b.out));
    if (device().is_cuda()) continue;  // LibTorch's backward there adds in any order
    EXPECT_TRUE(test::same_bits(a.q, b.q));
    EXPECT_TRUE(test::same_bits(a.k, b.k));
    EXPECT_TRUE(test::same_bits(a.v, b.v));
  }
}

TEST_P(Attention, Float64GoesThroughTheReference) {
  const Shape shape{2, 66, 2, 6, 4};
  const auto in = doubles(draw(shape, at::kFloat));
  const auto grad = random.normal({132, 2, 4}, at::kDouble, device());
  const auto got = run(attention, in, options(shape), grad);
  // Row 0 sees itself alone: its output is its value.
  EXPECT_TRUE(close(got.out[0], in.v[0], 1e-14));
  EXPECT_EQ(got.q.scalar_type(), at::kDouble);
}

TEST_P(Attention, TakesNoTokens) {
  const Shape shape{2, 0, 2, 8, 4};
  const auto in = draw(shape, at::kFloat);
  const auto got = run(attention, in, options(shape), at::empty({0, 2, 4}, in.q.options()));
  EXPECT_EQ(got.out.sizes(), (std::vector<int64_t>{0, 2, 4}));
  EXPECT_EQ(got.q.numel(), 0);
}

TEST_P(Attention, RefusesWhatDoesNotFit) {
  const Shape shape{2, 5, 2, 8, 4};
  const auto in = draw(shape, at::kFloat);
  auto o = options(shape);
  EXPECT_THROW(attention({in.q, in.v, in.v}, o), std::invalid_argument);
  EXPECT_THROW(attention({in.q, in.k, in.v.to(at::kBFloat16)}, o), std::invalid_argument);
  o.num_sequences = 3;
  EXPECT_THROW(attention(in, o), std::invalid_argument);
  o = options(shape);
  o.documents = at::empty({9}, in.q.options().dtype(at::kInt));
  EXPECT_THROW(attention(in, o), std::invalid_argument);
  o.documents = at::empty({10}, in.q.options().dtype(at::kLong));
  EXPECT_THROW(attention(in, o), std::invalid_argument);
  o = options(shape);
  o.scale = 0.0;
  EXPECT_THROW(attention(in, o), std::invalid_argument);
}

/// Every body that this machine can run, not only the one that it would choose.
TEST(AttentionKernel, EveryInstructionSetAgrees) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const int64_t b = 2, s = random.integer(1, 150), h = 2, qk = random.integer(1, 70),
                dv = random.integer(1, 70);
  for (const auto& body : kernels::attention_bodies()) {
    SCOPED_TRACE(::testing::Message() << body.name << " " << name_of(body.dtype) << " S " << s
                                      << " heads " << qk << "/" << dv);
    const auto dtype = body.dtype == DType::kF32 ? at::kFloat : at::kBFloat16;
    const auto draw = [&](int64_t dim) { return random.normal({b * s, h, dim}, dtype); };
    const AttentionInputs in{draw(qk), draw(qk), draw(dv)};
    const auto grad = draw(dv), out = at::empty_like(grad);
    const auto dq = at::empty_like(in.q), dk = at::empty_like(in.k), d_v = at::empty_like(in.v);
    const auto lse = at::empty({b, h, s}, at::TensorOptions(at::kFloat));
    const kernels::AttentionProblem problem{.num_sequences = b,
                                            .sequence_length = s,
                                            .num_heads = h,
                                            .qk_head_dim = qk,
                                            .v_head_dim = dv,
                                            .scale = 0.2f,
                                            .dtype = body.dtype,
                                            .q = in.q.const_data_ptr(),
                                            .k = in.k.const_data_ptr(),
                                            .v = in.v.const_data_ptr(),
                                            .q_strides = {h * qk, qk},
                                            .k_strides = {h * qk, qk},
                                            .v_strides = {h * dv, dv},
                                            .documents = nullptr};
    const auto scratch = at::empty({body.scratch(problem)}, at::TensorOptions(at::kByte));
    body.forward({problem, out.mutable_data_ptr(), lse.mutable_data_ptr<float>(),
                  scratch.mutable_data_ptr()});
    body.backward({problem, out.const_data_ptr(), grad.const_data_ptr(),
                   lse.const_data_ptr<float>(), dq.mutable_data_ptr(), dk.mutable_data_ptr(),
                   d_v.mutable_data_ptr(), scratch.mutable_data_ptr()});
    AttentionInputs leaves{in.q.to(at::kDouble), in.k.to(at::kDouble), in.v.to(at::kDouble)};
    for (auto* leaf : {&leaves.q, &leaves.k, &leaves.v}) leaf->requires_grad_(true);
    const auto want = reference::attention(
        leaves, {.num_sequences = b, .scale = 0.2f, .documents = {}, .remake = {}});
    want.backward(grad.to(at::kDouble));
    const double most = body.dtype == DType::kF32 ? 1e-5 : 2e-2;
    const double scale = leaves.v.grad().norm().item<double>();
    const auto error = [&](const at::Tensor& got, const at::Tensor& expected) {
      return got.to(at::kDouble).sub(expected).norm().item<double>() /
             std::max(scale, expected.norm().item<double>());
    };
    EXPECT_TRUE(close(out, want, most));
    EXPECT_LE(error(dq, leaves.q.grad()), most);
    EXPECT_LE(error(dk, leaves.k.grad()), most);
    EXPECT_LE(error(d_v, leaves.v.grad()), most);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, Attention, ::testing::ValuesIn(test::devices()),
                         [](const auto& instance) { return instance.param.str().substr(0, 4); });

}  // namespace
}  // namespace dsv3::ops
