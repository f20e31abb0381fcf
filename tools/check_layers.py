#!/usr/bin/env python3
"""Holds the #include lines of src/ to the table of rooms (docs/ARCHITECTURE.md) and to the banned headers.

Usage: tools/check_layers.py [ROOT]. Prints FILE:LINE: reason for each violation; exit code 1 if there is one.
Files beyond 600 lines (a source) or 250 (a header) are warnings only.
"""
import re
import sys
from pathlib import Path

ROOMS = {
    "base": "",
    "config": "base",
    "kernels": "base",
    "comm": "base",
    "ops": "base kernels",
    "nn": "base comm ops",
    "mla": "base config ops nn",
    "moe": "base config comm ops nn mla",
    "model": "base config kernels comm ops nn mla moe",
    "parallel": "base comm ops nn",
    "optim": "base comm kernels ops nn parallel",
    "data": "base config",
    "checkpoint": "base config comm nn",
    "monitor": "base config",
    "planner": "base config nn model parallel",
    "inference": "base config kernels comm ops nn mla moe model data checkpoint monitor",
    "training": "base config kernels comm ops nn mla moe model parallel optim data checkpoint monitor inference planner",
}
ROOMS["bench"] = "base kernels ops"  # in bench/, beside src/
ROOMS["cli"] = " ".join(ROOMS)
WITHOUT_TENSORS = {"base", "config", "kernels", "comm", "data", "monitor"}
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]')
LIBTORCH = re.compile(r"^(ATen|c10|torch|caffe2|nlohmann/torch)/")
BANNED = {"torch/torch.h", "torch/all.h", "torch/nn.h", "torch/extension.h", "ATen/ATen.h", "ATen/Functions.h"}


def violations(path, room):
    """Yields (line number, reason); room is None outside src/, where only the banned headers count."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if "torch::nn" in line.split("//")[0]:
            yield number, "torch::nn is banned: modules are plain structs of declared parameters"
        if not (match := INCLUDE.match(line)):
            continue
        header = match[2]
        if header in BANNED or header.startswith("torch/nn/"):
            yield number, f"{header} is banned: include ATen/core/Tensor.h and the exact ATen/ops/NAME.h"
        elif LIBTORCH.match(header) and path.suffix in (".cu", ".cuh"):
            yield number, f"{header}: CUDA sources know nothing of LibTorch"
        elif header.startswith("thrust/"):
            yield number, f"{header}: Thrust is banned, take the narrow CUB header"
        elif room and LIBTORCH.match(header) and room in WITHOUT_TENSORS:
            yield number, f"{header}: the room {room} sees no LibTorch"
        elif room and match[1] == '"':
            target = header.split("/")[0]
            if target not in ROOMS:
                yield number, f'"{header}": paths start at src/ ("ROOM/NAME.h")'
            elif target != room and target not in ROOMS[room].split():
                yield number, f"{header}: {room} may include only {ROOMS[room] or 'itself'}"


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    errors = files = 0
    for top in ("src", "tests", "bench"):
        for path in sorted(p for p in (root / top).rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")):
            files, relative = files + 1, path.relative_to(root)
            room = relative.parts[1] if top == "src" else "bench" if top == "bench" else None
            unknown = [(1, f"no room called {room} in the table")] if room and room not in ROOMS else []
            for number, reason in unknown or violations(path, room):
                print(f"{relative}:{number}: {reason}")
                errors += 1
            lines, limit = path.read_bytes().count(b"\n"), 250 if path.suffix in (".h", ".cuh") else 600
            if lines > limit:
                print(f"{relative}: warning: {lines} lines, think again at {limit}")
    print(f"check_layers: {files} files, {errors} violations")
    return 1 if errors else 0


sys.exit(main())
