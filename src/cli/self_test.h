#pragma once

#include <ATen/core/Tensor.h>

#include <random>
#include <string>
#include <utility>
#include <vector>

namespace dsv3::cli {

/// One operator on one device in one precision against its float64 reference.
struct SelfTestResult {
  std::string name;     // "rms_norm"
  std::string device;   // "cpu", "cuda"
  std::string dtype;    // "fp32", "bf16"
  double error = 0;     // worst of its results and gradients: ‖got - expected‖ / ‖expected‖
  double bar = 0;       // error must not exceed it
  std::string message;  // what it threw, if it did
  bool passed() const { return message.empty() && error <= bar; }
};

/// Runs every operator of ops/ on the CPU and, with `cuda`, on the current GPU; never throws for a
/// failure. A few seconds; inputs are the same on each call.
std::vector<SelfTestResult> run_self_tests(bool cuda);

/// What a self-test draws its inputs from and where it runs. Inputs are float64 on the host,
/// already rounded to `dtype`, so that operator and reference see the same numbers.
struct SelfTestSetup {
  at::Device device;
  at::ScalarType dtype;
  std::mt19937_64 random;

  at::Tensor normal(at::IntArrayRef shape);  // rounded N(0, 1), float64 on the host
  at::Tensor integers(at::IntArrayRef shape, int32_t below);  // int32 on the host in [0, below)
  at::Tensor place(const at::Tensor& host) const;             // as a leaf of `dtype` on `device`
  at::Tensor move(const at::Tensor& host) const;              // to `device`, dtype kept
};

/// {got, expected} of each result and gradient.
using SelfTestPairs = std::vector<std::pair<at::Tensor, at::Tensor>>;

/// One entry of the list of operators.
struct SelfTest {
  const char* name;
  SelfTestPairs (*run)(SelfTestSetup& setup);
  bool fp32_only = false;  // its contract knows no BF16
};

/// norm, SwiGLU, rotary, embedding, products, attention, head and loss.
std::vector<SelfTest> layer_self_tests();
/// gate, router with its balance loss, permutation, combination.
std::vector<SelfTest> routing_self_tests();
/// FP8 tiles, what leaves in FP8, the paged latent cache.
std::vector<SelfTest> fp8_self_tests();
/// AdamW, the gradient norm, the loss in parts of a vocabulary.
std::vector<SelfTest> training_self_tests();

}  // namespace dsv3::cli
