#include "mla/mla.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <gtest/gtest.h>

#include <set>

#include "mla/plain_mla.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3 {
namespace {

using test::close;

const std::string kPrefix = "model.layers.3.self_attn.";

ModelConfig small(bool q_lora) {
  ModelConfig config;
  config.hidden_size = 40;
  config.initializer_range = 0.2;
  config.mla = {.num_heads = 3,
                .q_lora_rank = q_lora ? 20 : 0,
                .kv_lora_rank = 24,
                .qk_nope_head_dim = 12,
                .qk_rope_head_dim = 6,
                .v_head_dim = 10};
  // Far apart, so that one in the other's place shows (NUMERICS trap 11).
  config.mla.latent_norm_eps = 1e-2;
  config.rms_norm_eps = 1e-6;
  return config;
}

/// A layer with random weights (norms too), its context and a way to run it.
struct Layer {
  ModelConfig config;
  ParameterSet parameters;
  Mla mla;
  at::Device device;

  Layer(const ModelConfig& given, DType dtype, at::Device where, test::Random& random)
      : config(given), device(where) {
    mla = Mla::declare(parameters, config, 3, kPrefix);
    parameters.allocate({.dtype = dtype, .cuda = where.is_cuda()});
    parameters.initialize(static_cast<uint64_t>(random.integer(0, 1 << 30)));
    for (auto& parameter : parameters.parameters()) {
      if (parameter.spec.init != Init::kOnes) continue;
      const auto values = random.normal(parameter.spec.shape, at::kDouble, where, 0.3, 1.0);
      parameter.weight.value.detach().copy_(values);
    }
  }

  ForwardContext context(int64_t sequences, int64_t length) const {
    ForwardContext context;
    context.num_sequences = sequences;
    context.sequence_length = length;
    context.positions = at::arange(sequences * length, at::TensorOptions(at::kInt))
                            .remainder(length)
                            .to(device, at::kInt);
    context.cos_sin = rope_table(config.rope, config.mla.qk_rope_head_dim, length).to(device);
    return context;
  }
};

struct Result {
  at::Tensor out, dx;
  std::map<std::string, at::Tensor> grads;  // by checkpoint name behind the prefix
};

Result run(Layer& layer, const at::Tensor& x, const at::Tensor& grad,
           const ForwardContext& context) {
  layer.parameters.zero_gradients();
  const auto leaf = x.detach().clone().requires_grad_(true);
  const auto out = layer.mla.forward({leaf, {}}, context);
  out.backward(grad);
  Result result{out.detach(), leaf.grad(), {}};
  for (const auto& parameter : layer.parameters.parameters()) {
    for (const auto& piece : parameter.spec.pieces) {
      result.grads[piece.name.substr(kPrefix.size())] =
          parameter.piece_view(piece, parameter.weight.grad).clone();
    }
  }
  return result;
}

Result run_plain(const Layer& layer, const at::Tensor& x, const at::Tensor& grad,
                 const ForwardContext& context) {
  const auto weights = test::plain_weights(layer.parameters, kPrefix);
  const auto leaf = x.detach().to(at::kCPU, at::kDouble).requires_grad_(true);
  const auto documents = context.documents.defined() ? context.documents.cpu() : context.documents;
  const double scale = 1.0 / std::sqrt(static_cast<double>(layer.config.mla.qk_head_dim()));
  const auto out = test::plain_mla(layer.config, weights, leaf, context.num_sequences,
                                   context.positions.cpu(), documents, scale);
  out.backward(grad.to(at::kCPU, at::kDouble));
  Result result{out.detach(), leaf.grad(), {}};
  for (const auto& [name, weight] : weights) result.grads[name] = weight.grad();
  return result;
}

void expect_close(const Result& got, const Result& want, double most) {
  EXPECT_TRUE(close(got.out, want.out, most));
  EXPECT_TRUE(close(got.dx, want.dx, most)) << "dx";
  ASSERT_EQ(got.grads.size(), want.grads.size());
  for (const auto& [name, grad] : want.grads) {
    EXPECT_TRUE(close(got.grads.at(name), grad, most)) << name;
  }
}

class MlaForward : public ::testing::TestWithParam<at::Device> {
 protected:
  at::Device device() const { return GetParam(); }

  at::Tensor random_documents(int64_t sequences, int64_t length) {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < sequences * length; ++i) {
      const bool next = i % length != 0 && random.integer(0, 9) == 0;
      ids.push_back(i % length == 0 ? 0 : ids.back() + (next ? 1 : 0));
    }
    const auto tensor = at::empty({sequences * length}, at::TensorOptions(at::kInt));
    std::copy(ids.begin(), ids.end(), tensor.mutable_data_ptr<int32_t>());
    return tensor.to(device());
  }

  uint64_t seed = test::fresh_seed();
  test::Random random{seed};
  ::testing::ScopedTrace trace{__FILE__, __LINE__, test::seed_text(seed)};
};

TEST_P(MlaForward, AgreesWithThePaperInEveryGradient) {
  for (const bool q_lora : {false, true}) {
    for (const auto dtype : {DType::kF64, DType::kF32}) {
      for (const bool documents : {false, true}) {
        SCOPED_TRACE(::testing::Message() << (q_lora ? "q_lora " : "") << name_of(dtype)
                                          << (documents ? " documents" : ""));
        Layer layer(small(q_lora), dtype, device(), random);
        const int64_t sequences = 2, length = 77;
        auto context = layer.context(sequences, length);
        if (documents) context.documents = random_documents(sequences, length);
        const auto type = dtype == DType::kF64 ? at::kDouble : at::kFloat;
        const auto x = random.normal({sequences * length, 40}, type, device());
        const auto grad = random.normal({sequences * length, 40}, type, device());
        // Float64: the rotary table is FP32 (2^-24 of cos and sin).
        expect_close(run(layer, x, grad, context), run_plain(layer, x, grad, context),
                     dtype == DType::kF64 ? 1e-6 : 1e-5);
      }
    }
  }
}

TEST_P(MlaForward, AgreesOnShapesDrawnAtRandom) {
  for (int i = 0; i < 6; ++i) {
    ModelConfig config;
    config.hidden_size = random.integer(1, 50);
    config.initializer_range = 0.2;
    config.mla = {.num_heads = random.integer(1, 4),
                  .q_lora_rank = i % 2 == 0 ? 0 : random.integer(2, 30),
                  .kv_lora_rank = random.integer(2, 40),
                  .qk_nope_head_dim = random.integer(1, 20),
                  .qk_rope_head_dim = 2 * random.integer(1, 6),
                  .v_head_dim = random.integer(1, 20)};
    Layer layer(config, DType::kF32, device(), random);
    const int64_t sequences = random.integer(1, 3), length = random.integer(8, 100);
    const auto x = random.normal({sequences * length, config.hidden_size}, at::kFloat, device());
    const auto grad = random.normal(x.sizes(), at::kFloat, device());
    const auto context = layer.context(sequences, length);
    expect_close(run(layer, x, grad, context), run_plain(layer, x, grad, context), 2e-5);
  }
}

TEST_P(MlaForward, RecomputesToTheSameBits) {
  for (const bool q_lora : {false, true}) {
    for (const auto dtype : {DType::kF32, DType::kBF16}) {
      Layer layer(small(q_lora), dtype, device(), random);
      const auto type = dtype == DType::kF32 ? at::kFloat : at::kBFloat16;
      const auto x = random.normal({140, 40}, type, device());
      const auto grad = random.normal({140, 40}, type, device());
      auto context = layer.context(2, 70);
      const auto kept = run(layer, x, grad, context);
      context.recompute = Recompute::kSelective;
      const auto remade = run(layer, x, grad, context);
      if (device().is_cuda()) {  // LibTorch's attention backward there adds in any order
        expect_close(remade, kept, dtype == DType::kF32 ? 1e-5 : 1e-2);
        continue;
      }
      EXPECT_TRUE(test::same_bits(remade.out, kept.out));
      EXPECT_TRUE(test::same_bits(remade.dx, kept.dx));
      for (const auto& [name, value] : kept.grads) {
        EXPECT_TRUE(test::same_bits(remade.grads.at(name), value)) << name;
      }
    }
  }
}

TEST_P(MlaForward, Bf16StaysCloseToFloat64) {
  for (const bool q_lora : {false, true}) {
    Layer layer(small(q_lora), DType::kBF16, device(), random);
    const auto x = random.normal({180, 40}, at::kBFloat16, device());
    const auto grad = random.normal({180, 40}, at::kBFloat16, device());
    const auto context = layer.context(2, 90);
    // A chain of about ten roundings, each of 2^-9, on both ways.
    expect_close(run(layer, x, grad, context), run_plain(layer, x, grad, context), 2.5e-2);
  }
}

TEST_P(MlaForward, GradientsAddUp) {
  Layer layer(small(true), DType::kF32, device(), random);
  const auto x = random.normal({20, 40}, at::kFloat, device());
  const auto grad = random.normal({20, 40}, at::kFloat, device());
  const auto context = layer.context(1, 20);
  run(layer, x, grad, context);
  const auto once = layer.mla.kv_b_proj->weight.grad.clone();
  layer.mla.forward({x, {}}, context).backward(grad);
  EXPECT_TRUE(close(layer.mla.kv_b_proj->weight.grad, once.mul(2.0), 1e-6));
}

TEST_P(MlaForward, RefusesAnotherNumberOfTokens) {
  Layer layer(small(true), DType::kF32, device(), random);
  const auto x = random.normal({19, 40}, at::kFloat, device());
  EXPECT_THROW(layer.mla.forward({x, {}}, layer.context(2, 10)), std::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Devices, MlaForward, ::testing::ValuesIn(test::devices()),
                         [](const auto& instance) { return instance.param.str().substr(0, 4); });

using Shapes = std::map<std::string, std::pair<std::vector<int64_t>, int>>;

/// Name → shape and tensor-parallel dim of every declared checkpoint tensor.
Shapes declared(const ModelConfig& config) {
  ParameterSet parameters;
  Mla::declare(parameters, config, 3, kPrefix);
  Shapes shapes;
  for (const auto& parameter : parameters.parameters()) {
    EXPECT_EQ(parameter.spec.layer, 3);
    EXPECT_FALSE(parameter.spec.expert);
    EXPECT_EQ(parameter.spec.decay, parameter.spec.shape.size() == 2) << parameter.spec.name;
    EXPECT_EQ(parameter.spec.init == Init::kOnes, parameter.spec.shape.size() == 1);
    for (const auto& piece : parameter.spec.pieces) {
      auto shape = parameter.spec.shape;
      shape[0] = piece.row_end - piece.row_begin;
      EXPECT_EQ(piece.name.rfind(kPrefix, 0), 0u);
      shapes[piece.name.substr(kPrefix.size())] = {shape, piece.tp_dim};
    }
  }
  return shapes;
}

TEST(MlaDeclaration, IsTheReleasedCheckpoint) {
  ModelConfig config;
  config.hidden_size = 7168;
  config.mla.num_heads = 128;
  config.mla.q_lora_rank = 1536;
  const Shapes want{
      {"q_a_proj.weight", {{1536, 7168}, -1}}, {"q_a_layernorm.weight", {{1536}, -1}},
      {"q_b_proj.weight", {{24576, 1536}, 0}}, {"kv_a_proj_with_mqa.weight", {{576, 7168}, -1}},
      {"kv_a_layernorm.weight", {{512}, -1}},  {"kv_b_proj.weight", {{32768, 512}, 0}},
      {"o_proj.weight", {{7168, 16384}, 1}}};
  EXPECT_EQ(declared(config), want);
}

TEST(MlaDeclaration, WithoutQueryCompression) {
  ModelConfig config;
  config.hidden_size = 2048;
  config.mla.num_heads = 16;
  const Shapes want{{"q_proj.weight", {{3072, 2048}, 0}},
                    {"kv_a_proj_with_mqa.weight", {{576, 2048}, -1}},
                    {"kv_a_layernorm.weight", {{512}, -1}},
                    {"kv_b_proj.weight", {{4096, 512}, 0}},
                    {"o_proj.weight", {{2048, 2048}, 1}}};
  EXPECT_EQ(declared(config), want);
}

}  // namespace
}  // namespace dsv3
