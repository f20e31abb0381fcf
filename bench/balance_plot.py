"""Draws the largest violation of balance of two runs, with and without the router's bias, as an SVG.

Usage: python bench/balance_plot.py WITH WITHOUT OUT.svg     (runs' directories; needs matplotlib)

MaxVio = (largest load of an expert − mean load) / mean load, over one global batch, the worst layer of the model
("Auxiliary-loss-free load balancing", arXiv 2408.15664, §4.1). Thin: every step; thick: median of 25 steps.

  dsv3 train configs/deepseek_v3_tiny.yaml --out runs/with
  dsv3 train configs/deepseek_v3_tiny.yaml --out runs/without model.moe.use_bias=false model.moe.sequence_loss_alpha=0
"""
import json
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "dsv3"  # the same picture gives the same file
import matplotlib.pyplot as pyplot


def read(run):
    rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    return [(row["step"], row["moe/max_vio"]) for row in rows if "moe/max_vio" in row]


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    runs = [("balancing off", read(sys.argv[2]), "#b5483a"), ("bias updated by γ = 0.001, α = 1e-4", read(sys.argv[1]), "#2b6ca3")]
    last = min(points[-1][0] for _, points, _ in runs)
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6))
    for label, points, colour in runs:
        points = [point for point in points if point[0] <= last]
        steps, values = zip(*points)
        axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.35)
        smooth = [statistics.median(values[max(0, i - 12):i + 13]) for i in range(len(values))]
        axes.plot(steps, smooth, color=colour, linewidth=1.8, label=label)
        print(json.dumps(dict(run=label, steps=len(points), median_of_last_100=round(statistics.median(values[-100:]), 3))))
    axes.set_xlabel("step")
    axes.set_ylabel("MaxVio of the worst layer")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(sys.argv[3], metadata={"Date": None})


if __name__ == "__main__":
    main()
