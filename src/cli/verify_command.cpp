#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "cli/build_info.h"
#include "cli/commands.h"
#include "cli/machine.h"
#include "cli/self_test.h"

namespace dsv3::cli {
namespace {

constexpr const char* kExamples =
    R"(Prints a table of what this machine has, what will be used and what not (and why), then checks every
operator on every device against its float64 reference.

Examples:
  dsv3 verify
  dsv3 verify --no-self-test       the table only

Exit codes: 0 all that is needed works; 1 something needed is broken.)";

enum class State { kOn, kOff, kBroken };

/// Prints rows; colours only for a person's terminal.
class Table {
 public:
  explicit Table(bool colour) : colour_(colour) {}

  void row(const std::string& what, State state, const std::string& text) {
    fmt::print("  {:<12} {} {}\n", what, paint(state), text);
    if (state == State::kBroken) broken_.push_back(what);
  }
  std::string paint(State state) const {
    const char* word = state == State::kOn ? "on    " : state == State::kOff ? "off   " : "BROKEN";
    if (!colour_) return word;
    const int code = state == State::kOn ? 32 : state == State::kOff ? 33 : 31;
    return fmt::format("\033[{}m{}\033[0m", code, word);
  }
  void mark_broken(const std::string& what) { broken_.push_back(what); }
  const std::vector<std::string>& broken() const { return broken_; }

 private:
  bool colour_;
  std::vector<std::string> broken_;
};

std::string yes_no(bool value) {
  return value ? "yes" : "no";
}

/// The directory of the LibTorch that this process has loaded; empty if unknown.
std::filesystem::path loaded_libtorch() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&at::show_config), &info) == 0) return "";
  std::error_code ignored;
  return std::filesystem::canonical(info.dli_fname, ignored).parent_path().parent_path();
}

/// "2.11.0+cu130" from the wheel's version.py; empty for a LibTorch without one.
std::string loaded_version(const std::filesystem::path& libtorch) {
  std::ifstream in(libtorch / "version.py");
  for (std::string line; std::getline(in, line);) {
    const size_t begin = line.find('\'');
    const size_t end = line.rfind('\'');
    if (line.starts_with("__version__") && begin < end) {
      return line.substr(begin + 1, end - begin - 1);
    }
  }
  return "";
}

void report_libtorch(Table& table) {
  const BuildInfo build = build_info();
  const std::filesystem::path path = loaded_libtorch();
  const std::string version = loaded_version(path);
  if (!version.empty() && !version.starts_with(build.libtorch_version)) {
    table.row("LibTorch", State::kBroken,
              fmt::format("{} is loaded from {}, but this program was built with {}: build again",
                          version, path.string(), build.libtorch_version));
    return;
  }
  table.row(
      "LibTorch", State::kOn,
      fmt::format("{}, {}", version.empty() ? build.libtorch_version : version, path.string()));
}

/// Best rates of 512³ products in GFLOP/s.
struct ProductRates {
  double fp32 = 0, bf16 = 0;
};

/// Alternates the two for half a second, so that other work on the cores disturbs both alike.
ProductRates product_rates() {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kSize = 512;
  constexpr std::chrono::milliseconds kBudget(500);
  const auto time_of = [](const at::Tensor& a) {
    const Clock::time_point start = Clock::now();
    const at::Tensor c = at::mm(a, a.t());
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  const at::Tensor fp32 = at::ones({kSize, kSize}, at::kFloat), bf16 = fp32.to(at::kBFloat16);
  const Clock::time_point begin = Clock::now();
  double best_fp32 = 1e30, best_bf16 = 1e30;
  for (int run = 0; run < 4 || Clock::now() - begin < kBudget; ++run) {
    const double seconds_fp32 = time_of(fp32), seconds_bf16 = time_of(bf16);
    if (run < 2) continue;  // the first ones build the kernels and warm up
    best_fp32 = std::min(best_fp32, seconds_fp32);
    best_bf16 = std::min(best_bf16, seconds_bf16);
  }
  constexpr double kGflop = 2e-9 * kSize * kSize * kSize;
  return {kGflop / best_fp32, kGflop / best_bf16};
}

void report_cpu(Table& table) {
  const CpuFacts cpu = cpu_facts();
  table.row(
      "CPU", State::kOn,
      fmt::format("{}, {} cores, {:.0f} GiB; AVX2 {}, AVX-512 {}, AVX512-BF16 {}, AMX-BF16 {}",
                  cpu.model, cpu.num_cores, cpu.memory_gib, yes_no(cpu.avx2), yes_no(cpu.avx512),
                  yes_no(cpu.avx512_bf16), yes_no(cpu.amx_bf16)));
  table.row(
      "threads", State::kOn,
      fmt::format("{} (training.num_threads or OMP_NUM_THREADS change it)", at::get_num_threads()));
  const auto [fp32, bf16] = product_rates();
  const std::string rates =
      fmt::format("512^3 product: BF16 {:.0f} GFLOP/s, FP32 {:.0f}", bf16, fp32);
  if (bf16 > 1.2 * fp32) {
    table.row(
        "BF16 on CPU", State::kOn,
        fmt::format("{}: {:.1f} times faster, train with model.dtype=bf16", rates, bf16 / fp32));
  } else if (cpu.avx512_bf16 || cpu.amx_bf16) {
    table.row("BF16 on CPU", State::kOff,
              rates + ": not faster just now, though the CPU has the instructions (is it busy?)");
  } else {
    table.row("BF16 on CPU", State::kOff,
              rates + ": the CPU has neither AVX512-BF16 nor AMX, train with model.dtype=fp32");
  }
}

void report_gpus(Table& table, const CudaFacts& cuda) {
  const BuildInfo build = build_info();
  if (cuda.gpus.empty()) {
    table.row("GPU", State::kOff,
              cuda.driver_present ? "see CUDA" : "no NVIDIA driver is loaded on this machine");
  }
  for (const GpuFacts& gpu : cuda.gpus) {
    const bool known = gpu.compute_major >= 8;
    table.row("GPU", known ? State::kOn : State::kBroken,
              fmt::format("{}, compute capability {}.{}, {:.0f} GiB{}", gpu.name, gpu.compute_major,
                          gpu.compute_minor, gpu.memory_gib,
                          known ? ""
                                : fmt::format(": the kernels are built for {}, 8.0 is the "
                                              "oldest that works",
                                              build.cuda_architectures)));
  }
}

void report_cuda(Table& table, const CudaFacts& cuda) {
  const BuildInfo build = build_info();
  const std::string built =
      fmt::format("built with {} for {}; runtime {}, driver up to {}", build.cuda_version,
                  build.cuda_architectures, cuda.runtime_version, cuda.driver_version);
  if (cuda.why_off.empty()) {
    table.row("CUDA", State::kOn, built);
  } else if (!build.cuda_version.empty() && cuda.driver_present) {
    // A CUDA build on a machine with a GPU was meant to use it.
    table.row("CUDA", State::kBroken, cuda.why_off + "; " + built);
  } else {
    table.row("CUDA", State::kOff,
              build.cuda_version.empty()
                  ? cuda.why_off
                  : fmt::format("{}; built with {} for {}", cuda.why_off, build.cuda_version,
                                build.cuda_architectures));
  }
  report_gpus(table, cuda);
  const bool on = cuda.why_off.empty();
  if (!on) {
    table.row("cuDNN", State::kOff, "used on a GPU only");
    table.row("NCCL", State::kOff, "used between GPUs only");
  } else {
    table.row("cuDNN", cuda.cudnn_version.empty() ? State::kOff : State::kOn,
              cuda.cudnn_version.empty() ? "not found: attention takes a slower way"
                                         : cuda.cudnn_version + ", attention");
    table.row(
        "NCCL", State::kOff,
        fmt::format("{}; one process trains on one GPU, so nothing uses it yet",
                    cuda.nccl_version.empty() ? "not found" : cuda.nccl_version + " is here"));
  }
  table.row("MPI", State::kOff, "training runs in one process; this build links no MPI");
}

void report_self_tests(Table& table, bool cuda) {
  fmt::print("\nSelf-test: relative error of results and gradients against float64\n");
  fmt::print("  {:<22} {:<6} {:<6} {:>9}   {:>7}\n", "operator", "device", "dtype", "error", "bar");
  for (const SelfTestResult& result : run_self_tests(cuda)) {
    const State state = result.passed() ? State::kOn : State::kBroken;
    const std::string verdict = result.passed() ? "ok" : table.paint(state);
    fmt::print("  {:<22} {:<6} {:<6} {:>9.1e} < {:>7.0e} {} {}\n", result.name, result.device,
               result.dtype, result.error, result.bar, verdict, result.message);
    if (!result.passed()) {
      table.mark_broken(fmt::format("{} on {} in {}", result.name, result.device, result.dtype));
    }
  }
}

void verify(bool self_test) {
  Table table(isatty(STDOUT_FILENO) == 1 && std::getenv("NO_COLOR") == nullptr);
  const BuildInfo build = build_info();
  fmt::print("dsv3 {}: this machine and this build\n", build.version);
  table.row("compiler", State::kOn, fmt::format("{}, {}", build.compiler, build.build_type));
  report_libtorch(table);
  report_cpu(table);
  const CudaFacts cuda = cuda_facts();
  report_cuda(table, cuda);
  if (self_test) report_self_tests(table, cuda.why_off.empty());
  if (!table.broken().empty()) {
    throw std::runtime_error(fmt::format("{} of what is needed does not work: {}",
                                         table.broken().size(), fmt::join(table.broken(), ", ")));
  }
  fmt::print(
      "\n{}; training will use {}.\n",
      self_test ? "All that is needed works" : "Nothing is broken here (operators not tested)",
      cuda.why_off.empty() ? "the GPU" : "the CPU");
}

}  // namespace

void add_verify_command(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("verify", "What this machine has, and whether it computes right");
  command->footer(kExamples);
  auto self_test = std::make_shared<bool>(true);
  command->add_flag("!--no-self-test", *self_test, "Print the table only");
  command->callback([self_test] { verify(*self_test); });
}

}  // namespace dsv3::cli
