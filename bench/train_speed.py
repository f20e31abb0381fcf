"""Training speed of dsv3 against transformers' DeepseekV3: same shapes, same machine, alternating in one run.

Usage: python bench/train_speed.py CONFIG.yaml [key=value …] [--rounds 3] [--steps 20] [--device cpu|cuda]
                                   [--ours fp32,bf16] [--theirs fp32:eager,bf16:eager,…] [--program build/release/bin/dsv3]
Each round runs every variant of ours and of theirs once, as a process of its own. A variant of theirs is dtype:experts or
dtype:experts:compiled. Tokens are random (a Megatron .bin/.idx pair made here), so only the speed means something.
Prints a JSON line per run, then a table of medians and the ratio of the best of each side.
"""
import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile

import numpy
import yaml

HERE = os.path.dirname(os.path.abspath(__file__))


def write_megatron(prefix, vocab_size, documents, length, seed=1):
    """A .bin/.idx pair of random documents, as Megatron's indexed dataset lays it out (int32 tokens)."""
    tokens = numpy.random.default_rng(seed).integers(0, vocab_size, documents * length, dtype=numpy.int32)
    tokens.tofile(prefix + ".bin")
    with open(prefix + ".idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, documents, documents + 1))
        numpy.full(documents, length, numpy.int32).tofile(index)
        (numpy.arange(documents, dtype=numpy.int64) * length * 4).tofile(index)
        numpy.arange(documents + 1, dtype=numpy.int64).tofile(index)


def run_ours(program, config, overrides, steps, device, dtype, directory):
    out = os.path.join(directory, "run")
    subprocess.run([program, "train", config, "--out", out, "--overwrite", "--steps", str(steps), "--device", device,
                    f"model.dtype={dtype}", "training.sample_tokens=0", "training.eval_every=0", "checkpoint.at_end=false", *overrides],
                   check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in open(os.path.join(out, "metrics.jsonl"))]
    rows = [row for row in rows if "train/tokens_per_sec" in row][3:]
    median = lambda key: statistics.median(row[key] for row in rows if row.get(key) is not None)
    result = dict(program="dsv3", dtype=dtype, steps=steps, tokens_per_sec=round(median("train/tokens_per_sec"), 1))
    for key, name in (("train/tflops", "tflops"), ("train/mfu", "mfu"), ("train/gpu_memory_allocated_gb", "memory_gb")):
        if any(row.get(key) is not None for row in rows):
            result[name] = round(median(key), 4)
    return result


def run_theirs(resolved, steps, device, variant):
    dtype, experts, *compiled = variant.split(":")
    done = subprocess.run([sys.executable, "-W", "ignore", os.path.join(HERE, "hf_train.py"), resolved, "--steps", str(steps),
                           "--device", device, "--dtype", dtype, "--experts", experts, *(["--compile"] if compiled else [])],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return dict(program="transformers", variant=variant, failed=done.stderr.strip().splitlines()[-1][:200])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ours", default="fp32,bf16")
    parser.add_argument("--theirs", default="fp32:eager,bf16:eager,fp32:grouped_mm,bf16:grouped_mm")
    parser.add_argument("--program", default=os.path.join(HERE, "..", "build", "release", "bin", "dsv3"))
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as directory:
        printed = subprocess.run([args.program, "config", args.config, *args.overrides], check=True, stdout=subprocess.PIPE, text=True)
        config = yaml.safe_load(printed.stdout)
        vocab = config["model"]["vocab_size"] or 264
        resolved = os.path.join(directory, "resolved.yaml")
        with open(resolved, "w") as file:
            file.write(printed.stdout)
        prefix = os.path.join(directory, "random")
        length = config["data"]["sequence_length"] + 1
        write_megatron(prefix, vocab, 512, length)
        overrides = [*args.overrides, f"data.train=[{{path: {prefix}}}]", "data.validation=[]", "data.validation_every=0",
                     f"data.tokenizer=ids:{vocab}"]
        results = []
        for _ in range(args.rounds):
            for dtype in filter(None, args.ours.split(",")):
                results.append(run_ours(args.program, args.config, overrides, args.steps, args.device, dtype, directory))
                print(json.dumps(results[-1]), flush=True)
            for variant in filter(None, args.theirs.split(",")):
                results.append(run_theirs(resolved, args.steps, args.device, variant))
                print(json.dumps(results[-1]), flush=True)
    groups = {}
    for row in results:
        if "failed" not in row:
            key = (row["program"], row["dtype"], row.get("experts", ""), "compiled" if row.get("compiled") else "")
            groups.setdefault(key, []).append(row["tokens_per_sec"])
    print(f"\n{'program':14}{'dtype':7}{'experts':12}{'mode':10}{'tokens/s (median)':>20}{'min':>10}{'max':>10}")
    best = {}
    for key, rates in groups.items():
        middle = statistics.median(rates)
        best[key[0]] = max(best.get(key[0], 0), middle)
        print(f"{key[0]:14}{key[1]:7}{key[2]:12}{key[3]:10}{middle:20.0f}{min(rates):10.0f}{max(rates):10.0f}")
    if len(best) == 2:
        print(f"dsv3 / transformers, best mode of each: {best['dsv3'] / best['transformers']:.2f}")


if __name__ == "__main__":
    main()
