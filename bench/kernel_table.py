"""GPU time by kind of kernel from a trace of ours (`dsv3 train … profile.steps='[a, b]'`): where each millisecond goes.

Usage: python bench/kernel_table.py TRACE.json [--steps N] [--top 25]
N is the number of steps in the trace (default: read from the trace's step ranges, else 1). Prints a JSON line, a table by kind
in ms per step, and the longest kernels.
"""
import argparse
import collections
import json
import re

# The first pattern that matches names the kind; kernels of ours carry their operation's name.
KINDS = [
    ("grouped product", r"[Gg]roup.*([Gg]emm|Problem|mm)|grouped"),
    ("attention forward", r"fmha.*([Ff]orward|fprop)|flash_fwd|sdpa.*fprop|fprop.*sdpa|cudnn.*sdpa.*fprop"),
    ("attention backward", r"fmha.*([Bb]ackward|bprop)|flash_bwd|sdpa.*bprop|bprop|dot_do_o|convert_dq"),
    ("optimizer and clip", r"adamw|sum_of_squares|finish_norm|optimizer"),
    ("cross-entropy", r"cross_entropy|softmax"),
    ("routing and permutation", r"route|permut|combine|histogram|rank_rows|balance|scan|counts|embedding|index|gather|scatter"),
    ("norm, SwiGLU, rotary", r"rms_norm|swiglu|rope"),
    ("product", r"nvjet|gemm|cutlass|xmma|splitK|cublas|sm90_"),
    ("elementwise and reduction", r"elementwise|reduce|CatArray|vectorized|unrolled"),
]


def kind_of(name):
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--top", type=int, default=25)
    args = parser.parse_args()
    events = json.load(open(args.trace))["traceEvents"]
    steps = args.steps or sum(1 for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("step")) or 1
    kernels, spans = collections.defaultdict(lambda: [0.0, 0]), []
    for event in events:
        category = event.get("cat", "")
        if category not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name = event["name"] if category == "kernel" else category
        kernels[name][0] += event["dur"] / 1e3
        kernels[name][1] += 1
        spans.append((event["ts"], event["ts"] + event["dur"]))
    kinds = collections.Counter()
    for name, (ms, _) in kernels.items():
        kinds["copy and fill" if name.startswith("gpu_mem") else kind_of(name)] += ms / steps
    busy, last = 0.0, 0.0
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    wall = (max(e for _, e in spans) - min(b for b, _ in spans)) / 1e3 / steps if spans else 0.0
    print(json.dumps(dict(steps=steps, wall_ms=round(wall, 2), busy_ms=round(busy / 1e3 / steps, 2),
                          kinds={k: round(v, 2) for k, v in kinds.most_common()})))
    print(f"\n{wall:.1f} ms a step from the first kernel to the last, {busy / 1e3 / steps:.1f} ms with a kernel running")
    for kind, ms in kinds.most_common():
        print(f"{ms:9.2f} ms  {kind}")
    print()
    for name, (ms, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:args.top]:
        print(f"{ms / steps:9.3f} ms x{count / steps:7.1f}  {name[:120]}")


if __name__ == "__main__":
    main()
