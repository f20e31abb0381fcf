"""Operators three ways in one run: ours and LibTorch's (`dsv3 bench op`), and torch.compile's (op_compiled.py), in turn.

Usage: python bench/op_speed.py [NAME …] [--shape v3|lite12|small|all] [--tokens N] [--device cpu|cuda] [--dtype bf16|fp32]
                                [--rounds N] [--turns 2] [--json FILE] [--program build/release/bin/dsv3]
For each operator the program and the compiled forms take turns, so that all of them see the same machine. Prints a JSON line per
measurement (to FILE with --json), then a table: median times in µs, ours as % of the copy's bandwidth, and how many times longer
the better of the other two takes. Stopped early (Ctrl-C, SIGTERM), it prints the table of what is there.
"""
import argparse
import json
import random
import signal
import statistics
import subprocess
import sys

import torch

import op_compiled


def ours(args, seed, name, rounds):
    """The lines of `dsv3 bench op` for one operator; a run without any line is one error line."""
    command = [args.program, "bench", "op", *op_compiled.case_arguments(argparse.Namespace(**vars(args) | {"names": [name]}))]
    done = subprocess.run([*command, "--seed", str(seed), "--rounds", str(rounds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [row for row in rows if row["op"] == name] or [{"op": name, "shape": args.shape, "way": "ours", "error": done.stderr.strip()[-300:]}]


def table(rows):
    """Medians of each (operator, shape, way) over the turns, one row an operator and shape."""
    groups = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"]), {}).setdefault(row["way"], []).append(row)

    def value(ways, way, key):
        found = [row[key] for row in ways.get(way, []) if key in row]
        return statistics.median(found) if found else None

    lines = [f"{'operator':30}{'shape':8}{'ours us':>11}{'LibTorch us':>13}{'compiled us':>13}{'% copy':>8}{'% compiled':>12}{'ratio':>8}"]
    for (name, shape), ways in groups.items():
        times = {way: value(ways, way, "median_us") for way in ("ours", "composed", "compiled")}
        others = [t for way, t in times.items() if way != "ours" and t is not None]
        ratio = min(others) / times["ours"] if others and times["ours"] else None
        percents = [value(ways, way, "percent_of_copy") for way in ("ours", "compiled")]
        cells = [("-" if t is None else f"{t:.1f}").rjust(width) for t, width in zip(times.values(), (11, 13, 13))]
        cells += [("-" if p is None else f"{p:.1f}").rjust(width) for p, width in zip(percents, (8, 12))]
        lines.append(f"{name:30}{shape:8}{''.join(cells)}{'-' if ratio is None else f'{ratio:.2f}':>8}")
    slower = sum(1 for line in lines[1:] if line.split()[-1] != "-" and float(line.split()[-1]) < 1)
    return "\n".join([*lines, f"{len(lines) - 1} cases, ours slower than another way in {slower}"])


def measure(args, seed, emit):
    timer = op_compiled.prepare(args.device, seed)
    rounds = args.rounds or (5 if args.device == "cpu" else 11)
    by_name = {}
    for plan in op_compiled.plans(args.program, op_compiled.case_arguments(args)):
        by_name.setdefault(plan["op"], []).append(plan)
    for name, cases in by_name.items():
        torch._dynamo.reset()
        for _ in range(args.turns):
            for row in ours(args, seed, name, rounds):
                emit(row)
            for plan in cases:
                if row := op_compiled.run_plan(plan, timer, rounds, seed):
                    emit(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    op_compiled.case_options(parser)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", help="append the JSON lines to this file instead of printing them")
    args = parser.parse_args()
    seed = args.seed or random.SystemRandom().randrange(1, 1 << 31)
    rows = []

    def emit(row):
        rows.append(row)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(row) + "\n")
        else:
            print(json.dumps(row), flush=True)

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    stopped = False
    try:
        measure(args, seed, emit)
    except KeyboardInterrupt:
        stopped = True
    print(f"\n{table(rows)}" + ("\nstopped early: not every case is here" if stopped else ""), flush=True)
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
