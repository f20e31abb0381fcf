// DESIGN: no copy from the device to the host inside a step except the metrics' one, which nobody
// waits for within the step.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/ones.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include "optim/adamw.h"
#include "support/forbid_waiting.h"
#include "training/bad_numbers.h"
#include "training/step.h"
#include "training/tiny.h"

namespace dsv3 {
namespace {

class NoWaitTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "only a GPU can make the host wait, and there is none here";
  }
  at::Device device_{at::kCUDA, 0};
};

TEST_F(NoWaitTest, TheGuardSeesAHostThatWaits) {
  const at::Tensor one = at::ones({}, at::TensorOptions(at::kFloat).device(device_));
  {
    const test::ForbidWaiting guard;
    EXPECT_THROW(one.item<float>(), c10::Error);
    EXPECT_THROW(one.cpu(), c10::Error);
  }
  EXPECT_EQ(one.item<float>(), 1);
}

/// What Trainer::step does, without reading the numbers.
PendingNumbers one_step(Model& model, AdamW& optimizer, BadNumbers& bad_numbers,
                        const GlobalBatch& batch, const GradientOptions& options) {
  const StepSums sums = accumulate_gradients(model, batch, options);
  GradientNorm norm = optimizer.decide({.losses = sums.scalars});
  bad_numbers.locate(norm.skip, 1);
  optimizer.apply(1e-3, norm);
  model.update_router_biases(sums.load.tokens, 1e-3, norm.skip);
  return {sums, norm, batch};
}

TEST_F(NoWaitTest, AStepNeverWaitsForTheGpu) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto dtype : {DType::kBF16, DType::kF32}) {
    for (const auto recompute : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
      for (const bool mask : {false, true}) {
        SCOPED_TRACE(testing::Message()
                     << name_of(dtype) << ", recompute " << static_cast<int>(recompute)
                     << (mask ? ", masked documents" : ""));
        ModelConfig config = test::tiny_model();
        config.dtype = dtype;
        ParameterSet parameters;
        Model model(config, parameters);
        parameters.allocate({.dtype = dtype, .gradients = true, .cuda = true});
        parameters.initialize(seed);
        AdamW optimizer(parameters.buckets(), {});
        BadNumbers bad_numbers(parameters);
        Batch padded = test::random_batch(random, config, 2, 16);
        for (size_t i = 28; i < 32; ++i) {
          padded.labels[i] = kIgnoreLabelId;
          padded.documents[i] = kPaddingDocument;
        }
        const auto batch =
            make_global_batch({test::random_batch(random, config, 2, 16), padded}, 1, mask);
        const GradientOptions options{.device = device_,
                                      .mask_documents = mask,
                                      .recompute = recompute,
                                      .balance_alpha = 1e-2,
                                      .mtp_weight = 0.3};
        // The first step may wait: it copies the rotary table and opens libraries.
        one_step(model, optimizer, bad_numbers, batch, options).wait();
        std::optional<PendingNumbers> numbers;
        {
          const test::ForbidWaiting guard;
          EXPECT_NO_THROW(numbers.emplace(one_step(model, optimizer, bad_numbers, batch, options)));
        }
        if (numbers) {
          EXPECT_GT(numbers->wait().loss, 0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace dsv3
