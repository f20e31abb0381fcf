"""Kills the trainer at random moments, saves included, lets it go on each time, and compares what it ends with, bit by
bit, with a run that nobody disturbed.

Usage: kill_test.py --dsv3 PATH [--kills N] [--reach STEPS] [--seed N] [--device cuda]. Ends with `N passed, N failed, N skipped`.
Needs Python's standard library only. The long version (--kills 100) and its result: docs/reliability.md.

Rounds of a short training are run until there were N kills. In each, the same directory is trained with `dsv3 train`
until it is finished, and every process is killed (SIGKILL) at a random moment: while it starts, while it loads, between
and during steps, during saves. After each kill every checkpoint must be whole, and the next process must go on from the
newest one. At the end of a round, weights, moments, master weights and metric lines must be those of the undisturbed run.
"""
import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Metrics that measure time or memory differ from run to run; all others must be equal.
MEASURED = re.compile(r"time|per_sec|tflops|mfu|memory|seconds|^step_|host")
CONFIG = """
model:
  {num_layers: 2, hidden_size: 32, intermediate_size: 48, dtype: bf16, initializer_range: 0.05, max_position_embeddings: 64,
   mla: {num_heads: 2, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8},
   moe: {num_experts: 4, num_experts_per_token: 2, moe_intermediate_size: 16, first_k_dense_replace: 1},
   mtp: {num_nextn_predict_layers: 1}}
data: {train: TEXT, document_split: line, validation_every: 10, sequence_length: 32, mask_across_documents: true}
training: {steps: 60, micro_batch_size: 2, global_batch_size: 4, num_threads: 1, deterministic: true, device: DEVICE,
           eval_every: 7, eval_batches: 3, sample_tokens: 0}
optimizer: {learning_rate: {type: cosine, peak: 3.0e-3, warmup_steps: 10}}
checkpoint: {every_steps: 3, keep_last: 2, keep_every: 20}
"""


class Failure(Exception):
    pass


def processor():
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.machine()


def check(condition, message):
    if not condition:
        raise Failure(message)


def metric_lines(run):
    """The lines of steps and evaluations, without what was measured; lines of events are left out."""
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "event" not in record:
            lines.append({key: value for key, value in record.items() if not MEASURED.search(key)})
    return lines


def resumed_steps(run):
    """The steps from which the run went on, in order."""
    if not (run / "metrics.jsonl").exists():
        return []
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]  # the last one may be cut
    return [record["step"] for record in map(json.loads, lines) if record.get("event") == "resume"]


def newest_checkpoint(run):
    steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")]
    return max(steps, default=0)


def compare(run, reference):
    """Fails unless both runs ended with the same numbers."""
    last = f"checkpoints/step_{newest_checkpoint(reference)}"
    names = {path.name for path in (reference / last).iterdir() if path.name.endswith(".safetensors")}
    check({"model.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "master.safetensors"} <= names, f"{names}")
    for name in sorted(names):
        check((run / last / name).read_bytes() == (reference / last / name).read_bytes(), f"{name} differs")
    ours, theirs = metric_lines(run), metric_lines(reference)
    for number, (a, b) in enumerate(zip(ours, theirs)):
        check(a == b, f"metric line {number}: {a} instead of {b}")
    check(len(ours) == len(theirs), f"{len(ours)} metric lines instead of {len(theirs)}")


class KillTest:
    def __init__(self, dsv3, directory, rng, reach, device):
        self.dsv3, self.directory, self.rng, self.reach = dsv3, Path(directory), rng, reach
        self.kills = self.in_saves = self.in_starts = 0
        self.start_seconds = self.step_seconds = 0.0  # of the undisturbed run
        words = ["in", "the", "beginning", "was", "word", "and", "light", "shone", "over", "water"]
        text = random.Random(1)
        (self.directory / "text.txt").write_text("".join(
            " ".join(text.choice(words) for _ in range(text.randint(3, 14))) + "\n" for _ in range(400)))
        self.config = self.directory / "config.yaml"
        self.config.write_text(CONFIG.replace("TEXT", str(self.directory / "text.txt")).replace("DEVICE", device))

    def start(self, run):
        # The first start names the config, the later ones the run, as a user would.
        target = [run] if (run / "config.yaml").exists() else [self.config, "--out", run]
        log = open(self.directory / "output.txt", "w")
        return subprocess.Popen([self.dsv3, "train", *map(str, target)], stdout=log, stderr=log)

    def output(self):
        return (self.directory / "output.txt").read_text()

    def wait_for_life(self, process, run, size):
        """Returns when the process has written to metrics.jsonl, that is, gone on with the run; or has ended."""
        metrics = run / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and (metrics.stat().st_ino, metrics.stat().st_size) != size:
                return
            time.sleep(0.002)

    def disturb(self, run):
        """One process: killed at a random moment (True), or finished before it (False)."""
        metrics, newest, resumes = run / "metrics.jsonl", newest_checkpoint(run), resumed_steps(run)
        size = (metrics.stat().st_ino, metrics.stat().st_size) if metrics.exists() else (0, 0)
        process = self.start(run)
        starting = self.rng.random() < 0.2
        if not starting:
            self.wait_for_life(process, run, size)
        time.sleep(self.rng.uniform(0, self.start_seconds if starting else self.reach * self.step_seconds))
        process.kill()
        code = process.wait()
        finished = code == 0  # a process that is already leaving keeps its own code
        check(code in (0, -9), f"exit code {code}: {self.output()}")
        now = resumed_steps(run)
        check(len(now) == len(resumes) or now[-1] == newest, f"went on from step {now[-1:]}, but step {newest} was saved")
        if finished:
            return False
        self.kills += 1
        self.in_starts += starting
        self.in_saves += any((run / "checkpoints").glob(".step_*"))
        return True

    def verify(self, run):
        """No checkpoint that stands there may be broken, at any moment."""
        if newest_checkpoint(run) == 0:
            return
        result = subprocess.run([self.dsv3, "checkpoint", "verify", str(run)], capture_output=True, text=True)
        check(result.returncode == 0, result.stdout + result.stderr)

    def round(self, run, reference):
        saved = 0
        while self.disturb(run):
            self.verify(run)
            newest = newest_checkpoint(run)
            check(newest >= saved, f"step {newest} is the newest checkpoint, but step {saved} was")
            saved = newest
        check(not any((run / "checkpoints").glob(".step_*")), "an unfinished save was left behind")
        compare(run, reference)

    def run(self, kills):
        reference = self.directory / "reference"
        begin = time.monotonic()
        process = self.start(reference)
        self.wait_for_life(process, reference, (0, 0))
        self.start_seconds = time.monotonic() - begin
        check(process.wait() == 0, self.output())
        self.step_seconds = (time.monotonic() - begin - self.start_seconds) / 60
        rounds = 0
        while self.kills < kills:
            run = self.directory / f"run{rounds}"
            self.round(run, reference)
            shutil.rmtree(run)
            rounds += 1
        return rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsv3", required=True)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn and printed when absent")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--reach", type=float, default=15, help="steps after which a process is killed at the latest")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    start, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="dsv3_kill_") as directory:
        test = KillTest(str(Path(arguments.dsv3).resolve()), directory, random.Random(seed), arguments.reach, arguments.device)
        try:
            rounds = test.run(arguments.kills)
            print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, {arguments.device}: "
                  f"{test.kills} kills in {rounds} rounds ({test.in_starts} while a process started, {test.in_saves} "
                  f"with a save under way), every round bitwise equal, {time.monotonic() - start:.0f} s")
        except Failure as failure:
            failed = 1
            print(f"FAILED after {test.kills} kills: {failure}\n{test.output()[-2000:]}")
    print(f"{1 - failed} passed, {failed} failed, 0 skipped", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
