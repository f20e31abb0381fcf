"""torch.compile's forms of the operators that `dsv3 bench op` times: same shapes, same way of timing, same JSON lines.

Usage: python bench/op_compiled.py [NAME …] [--shape v3|lite12|small|all] [--tokens N] [--device cpu|cuda] [--dtype bf16|fp32]
                                   [--rounds N] [--program build/release/bin/dsv3]
Names, sizes and bytes come from `dsv3 bench op --dry-run`. Each line has "way": "compiled"; docs/performance.md explains the keys.
On CUDA a sample is one CUDA graph of many runs over sets of inputs that exceed the L2 cache, which is overwritten before.
"""
import argparse
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time

import torch
import torch._dynamo.config
import torch._functorch.config

import compiled_fp8_cases  # noqa: F401  adds its cases
from compiled_cases import CASES

HERE = os.path.dirname(os.path.abspath(__file__))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Inputs:
    """Draws fresh random inputs on one device."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype

    def normal(self, sizes, grad=False, std=1.0, dtype=None):
        values = torch.randn(sizes, device=self.device, dtype=dtype or self.dtype)
        return (values.mul_(std) if std != 1.0 else values).requires_grad_(grad)

    def floats(self, sizes, grad=False):
        return self.normal(sizes, grad, dtype=torch.float32)

    def integers(self, sizes, below):
        return torch.randint(below, sizes, device=self.device, dtype=torch.int32)


@functools.cache
def compile_once(function):
    return torch.compile(function, dynamic=False)


def results(case, compiled):
    """A function that makes what is timed: the outputs, the gradients of known outputs, or those of a scalar output."""
    if not case.leaves:
        def forward():
            with torch.no_grad():
                return compiled(*case.inputs)
        return forward
    if case.upstream is None:
        return lambda: torch.autograd.grad(compiled(*case.inputs), case.leaves)
    outputs = []

    def backward():
        if not outputs:
            result = compiled(*case.inputs)
            outputs.extend(result if isinstance(result, tuple) else (result,))
        return torch.autograd.grad(outputs, case.leaves, case.upstream, retain_graph=True)
    return backward


def runner(case, compile=compile_once):
    """What is timed. Results are kept until the next run of the same inputs: without, those of all sets would take turns in the
    same memory, which a cache may hold, while ours go to as many places as there are sets."""
    if case.several:
        return case.several(compile)
    make, kept = results(case, compile(case.function)), []

    def run():
        kept[:] = [make()]
    return run


class CpuTimer:
    sample_seconds, copy_bytes, timed = 5e-3, 256 << 20, "clock"
    cache_bytes = max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 32 << 20) if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 32 << 20

    def seconds(self, work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def sampler(self, runs, repeats):
        def all_runs():
            for _ in range(repeats):
                for run in runs:
                    run()
        return lambda: self.seconds(all_runs) / (repeats * len(runs))

    def synchronize(self):
        pass


class CudaTimer:
    sample_seconds, copy_bytes, timed = 1e-3, 1 << 30, "graph"

    def __init__(self):
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.flushed = torch.empty(4 * self.cache_bytes, dtype=torch.uint8, device="cuda")
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, work):
        self.flushed.zero_()
        self.begin.record()
        work()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) * 1e-3

    def sampler(self, runs, repeats):
        repeats = min(repeats, max(1, 1024 // len(runs)))
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(repeats):
                for run in runs:
                    run()
        graph.replay()
        self.synchronize()
        return lambda: self.seconds(graph.replay) / (repeats * len(runs))

    def synchronize(self):
        torch.cuda.synchronize()


def number_of_sets(plan, cache_bytes):
    """As sets_of in bench/ops/run.cpp."""
    wanted = 4 * cache_bytes // max(1, plan["bytes"]) + 1
    return max(1, min(wanted, (1 << 29) // max(1, plan["allocated"]), 128))


def short(value):
    return float(f"{value:.4g}")


def time_case(plan, timer, rounds):
    """The keys of one JSON line: times, or an error."""
    make = Inputs(plan["device"].split(":")[0], DTYPES[plan["dtype"]])
    sets = number_of_sets(plan, timer.cache_bytes)
    cases = [CASES[plan["op"]](plan["dims"], make) for _ in range(sets)]
    runs = [runner(case) for case in cases]
    for _ in range(2):
        for run in runs:
            run()
    timer.synchronize()
    warm = timer.seconds(lambda: [run() for run in runs])
    sample = timer.sampler(runs, min(1000, math.ceil(timer.sample_seconds / max(warm, 1e-9))))
    source = torch.zeros(timer.copy_bytes, dtype=torch.uint8, device=make.device)
    target = torch.zeros_like(source)
    times, copies = [], []
    for _ in range(rounds):
        times.append(sample())
        copies.append(timer.seconds(lambda: target.copy_(source)))
    median, copy = statistics.median(times), 2 * timer.copy_bytes / statistics.median(copies)
    rate = plan["bytes"] / median
    return {"median_us": short(median * 1e6), "min_us": short(min(times) * 1e6), "gbps": short(rate * 1e-9),
            "copy_gbps": short(copy * 1e-9), "percent_of_copy": short(100 * rate / copy), "timed": timer.timed,
            "rounds": rounds, "sets": sets}


def plans(program, arguments):
    """Cases as the program states them; for wrong names its message and its exit code, 2, which a missing program has too."""
    try:
        done = subprocess.run([program, "bench", "op", "--dry-run", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        print(f"{program}: {error.strerror} (build it, or name it with --program)", file=sys.stderr)
        sys.exit(2)
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
        sys.exit(done.returncode)
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_plan(plan, timer, rounds, seed):
    """One JSON object with "way": "compiled"; None for an operator without a compiled form."""
    if plan["op"] not in CASES:
        return None
    row = {key: value for key, value in plan.items() if key != "allocated"} | {"way": "compiled"}
    try:
        row |= time_case(plan, timer, rounds)
    except Exception as error:  # out of memory, or what the compiler refuses: the others still run
        row["error"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    torch.cuda.empty_cache()
    return row | {"seed": seed}


def prepare(device, seed):
    """The timer of the device; on CUDA all work goes to a stream that can be captured."""
    torch.manual_seed(seed)
    torch._functorch.config.donated_buffer = False  # one graph's backward runs many times
    torch._dynamo.config.cache_size_limit = 64
    if device == "cpu":
        return CpuTimer()
    torch.cuda.set_stream(torch.cuda.Stream())
    return CudaTimer()


def case_options(parser):
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--shape", default="all")
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--program", default=os.path.join(HERE, "..", "build", "release", "bin", "dsv3"))


def case_arguments(args):
    """The options that `dsv3 bench op` shares."""
    words = [*args.names, "--shape", args.shape, "--device", args.device, "--dtype", args.dtype]
    return [*words, "--tokens", str(args.tokens)] if args.tokens else words


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    case_options(parser)
    args = parser.parse_args()
    seed = args.seed or random.SystemRandom().randrange(1, 1 << 31)
    timer = prepare(args.device, seed)
    rounds = args.rounds or (5 if args.device == "cpu" else 21)
    last = None
    for plan in plans(args.program, case_arguments(args)):
        if plan["op"] != last:
            torch._dynamo.reset()
        last = plan["op"]
        if row := run_plan(plan, timer, rounds, seed):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
