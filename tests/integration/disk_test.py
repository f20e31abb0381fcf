"""Trains on disks that are full, read-only or damaged: each trouble must be named with its file and cause, the previous
checkpoint must be offered, and nothing may be lost.

Usage: disk_test.py --dsv3 PATH. Ends with `N passed, N failed, N skipped`. Needs Python's standard library only; small
and read-only disks are mounted, which needs root (skipped otherwise). tests/training/resume_test.cpp injects failing
writes into each action of a save.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

import suite

DSV3 = ""
CONFIG = """
model:
  {num_layers: 2, hidden_size: 64, intermediate_size: 96, dtype: fp32, initializer_range: 0.05, max_position_embeddings: 64,
   mla: {num_heads: 2, kv_lora_rank: 16, qk_nope_head_dim: 16, qk_rope_head_dim: 8, v_head_dim: 16},
   moe: {num_experts: 4, num_experts_per_token: 2, moe_intermediate_size: 32, first_k_dense_replace: 1}}
data: {train: TEXT, document_split: line, sequence_length: 32}
training: {steps: 30, micro_batch_size: 2, global_batch_size: 2, num_threads: 1, device: cpu, sample_tokens: 0, log_every: 10}
checkpoint: {every_steps: 5, keep_last: 2}
"""


def run(*command):
    """Standard output and error apart, as text."""
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)


class Disk(unittest.TestCase):
    def setUp(self):
        self.directory = Path(tempfile.mkdtemp(prefix="dsv3_disk_"))
        self.mounts = []
        text = self.directory / "text.txt"
        text.write_text("".join(f"line {i} of a text that says little, again and again\n" for i in range(300)))
        self.config = self.directory / "config.yaml"
        self.config.write_text(CONFIG.replace("TEXT", str(text)))
        self.run_directory = self.directory / "disk" / "run"

    def tearDown(self):
        for path in reversed(self.mounts):
            run("umount", "-l", path)
        shutil.rmtree(self.directory, ignore_errors=True)

    def mount(self, size):
        path = self.directory / "disk"
        path.mkdir()
        result = run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)
        if result.returncode != 0:
            self.skipTest(f"no small disk can be mounted here: {result.stderr.strip()}")
        self.mounts.append(path)
        return path

    def train(self, *options):
        target = self.run_directory if (self.run_directory / "config.yaml").exists() else self.config
        return run(DSV3, "train", target, *([] if target == self.run_directory else ["--out", self.run_directory]), *options)

    def events(self, name):
        # A run that still writes may have written the last line in part.
        lines = (self.run_directory / "metrics.jsonl").read_text().split("\n")[:-1]
        return [record for record in map(json.loads, lines) if record.get("event") == name]

    def steps(self):
        return sorted(int(path.name[5:]) for path in (self.run_directory / "checkpoints").glob("step_*"))

    def assert_error(self, result, code, *words):
        self.assertEqual(result.returncode, code, result.stdout + result.stderr)
        self.assertRegex(result.stderr, r"(?m)\Adsv3: error: [^\n]+\n\Z")
        for word in words:
            self.assertIn(str(word), result.stderr)

    def assert_verified(self):
        result = run(DSV3, "checkpoint", "verify", self.run_directory)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def test_a_disk_too_small_for_another_checkpoint_keeps_the_run_and_the_last_one(self):
        disk = self.mount("8m")  # a checkpoint has 1.7 MB, and a margin of 1 MB is asked for
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(3_000_000))
        result = self.train("training.steps=12")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertEqual(self.steps(), [10, 12])
        ballast.write_bytes(bytes(4_600_000 - 1_700_000))
        os.truncate(ballast, 0)
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - 2_000_000))  # less than a checkpoint and its margin
        result = self.train("--steps", "18")
        self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
        self.assertRegex(result.stdout, r"the checkpoint of step 15 was not saved: \S*checkpoints has \d+\.\d MB free, but the checkpoint needs")
        self.assertRegex(result.stderr, r"dsv3: error: the checkpoint of step 18 was not saved: .* go on from there with: dsv3 train ")
        self.assertEqual(self.steps(), [10, 12])
        self.assert_verified()
        self.assertGreaterEqual(len(self.events("save_failed")), 1)
        ballast.unlink()  # room again: the run goes on and ends
        result = self.train("--steps", "18")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertEqual(self.steps()[-1], 18)
        self.assert_verified()

    def test_a_disk_that_is_full_to_the_last_byte_loses_nothing(self):
        disk = self.mount("8m")
        result = self.train("training.steps=10")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        with open(disk / "ballast", "wb", buffering=0) as ballast:
            try:
                while ballast.write(bytes(4096)) == 4096:
                    pass
            except OSError:
                pass
        self.assertEqual(shutil.disk_usage(disk).free, 0)
        result = self.train("--steps", "20")
        self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
        self.assertRegex(result.stderr, r"\Adsv3: error: [^\n]*No space left on device[^\n]*\n\Z|\Adsv3: error: [^\n]*0\.0 MB free[^\n]*\n\Z")
        self.assertIn(str(self.run_directory), result.stderr)
        self.assert_verified()
        (disk / "ballast").unlink()
        result = self.train("--steps", "20")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertEqual(self.steps()[-1], 20)
        steps = [json.loads(line) for line in (self.run_directory / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual([record["step"] for record in steps if "train/loss" in record], list(range(1, 21)))

    def test_a_disk_that_fills_while_training(self):
        disk = self.mount("16m")
        output = open(self.directory / "output.txt", "w+")  # a pipe that nobody reads would fill up
        self.addCleanup(output.close)
        process = subprocess.Popen([DSV3, "train", self.config, "--out", self.run_directory, "--steps", "100000"],
                                   stdout=output, stderr=subprocess.STDOUT)
        self.addCleanup(process.kill)
        while process.poll() is None and not any((self.run_directory / "checkpoints").glob("step_*")):
            time.sleep(0.01)
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(bytes(max(0, free - 1_500_000)))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not self.events("save_failed"):
            time.sleep(0.05)
        self.assertIsNone(process.poll(), "a failed save ended the run")
        self.assertTrue(self.events("save_failed"))
        self.assert_verified()
        (disk / "ballast").unlink()
        saved = self.steps()[-1]
        while process.poll() is None and time.monotonic() < deadline and self.steps()[-1] == saved:
            time.sleep(0.05)
        self.assertGreater(self.steps()[-1], saved, "it did not try again")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(timeout=60), 143, (self.directory / "output.txt").read_text()[-2000:])
        self.assert_verified()

    def test_a_read_only_directory_is_named(self):
        disk = self.mount("16m")
        self.assertEqual(self.train("training.steps=10").returncode, 0)
        run("mount", "-o", "remount,ro", disk)
        self.assert_error(self.train("--steps", "20"), 1, self.run_directory, "Read-only file system")
        self.assert_verified()
        self.assertEqual(run(DSV3, "generate", self.run_directory, "--prompt", "line", "--tokens", "4").returncode, 0)
        result = run(DSV3, "train", self.config, "--out", disk / "other")
        self.assert_error(result, 1, disk / "other", "Read-only file system")
        run("mount", "-o", "remount,rw", disk)
        self.assertEqual(self.train("--steps", "20").returncode, 0)

    def test_a_damaged_checkpoint_is_named_and_the_previous_one_offered(self):
        (self.directory / "disk").mkdir()
        self.assertEqual(self.train("training.steps=10").returncode, 0)
        self.assertEqual(self.steps(), [5, 10])
        newest = self.run_directory / "checkpoints" / "step_10"
        for name in sorted(path.name for path in newest.iterdir()):
            with self.subTest(name):
                path, whole = newest / name, (newest / name).read_bytes()
                path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
                way = f"dsv3 train {self.run_directory} --from-step 5"
                self.assert_error(self.train("--steps", "12"), 1, f"step_10 is damaged: {name}: ", way)
                result = run(DSV3, "checkpoint", "verify", self.run_directory)
                self.assertEqual(result.returncode, 1)
                self.assertIn(f"  {name}: ", result.stdout)
                self.assertIn(way, result.stdout)
                path.unlink()
                self.assert_error(self.train("--steps", "12"), 1, f"{name}: is missing", way)
                listed = run(DSV3, "checkpoint", "list", self.run_directory)
                self.assertEqual(listed.returncode, 1)
                self.assertRegex(listed.stdout, rf"(?m)^ +5 .* whole$\n^ +10 .* damaged: {re.escape(name)}: is missing")
                path.write_bytes(whole)
        (newest / "model.safetensors").write_bytes(b"short")
        for command in (["eval", self.run_directory, self.directory / "text.txt"], ["generate", self.run_directory, "--prompt", "x"]):
            self.assert_error(run(DSV3, *command), 1, "step_10 is damaged: model.safetensors: ", "checkpoints/step_5")
        result = self.train("--from-step", "5", "--steps", "12")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual((self.run_directory / "set_aside" / "step_10" / "model.safetensors").read_bytes(), b"short")
        self.assert_verified()


class Signals(unittest.TestCase):
    """Resuming, signals and the time limit from outside."""

    setUp, tearDown, train, steps, events = Disk.setUp, Disk.tearDown, Disk.train, Disk.steps, Disk.events
    assert_error, assert_verified = Disk.assert_error, Disk.assert_verified

    def start(self, *options):
        """A long run whose first step is done."""
        process = subprocess.Popen([DSV3, "train", self.config, "--out", self.run_directory, "--steps", "1000000",
                                    "training.log_every=10000", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.addCleanup(process.kill)
        metrics = self.run_directory / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 0):
            time.sleep(0.01)
        return process

    def test_stops_save_print_the_command_and_have_their_codes(self):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            self.run_directory = self.directory / "disk" / f"run{code}"
            process = self.start("checkpoint.every_steps=0")
            process.send_signal(number)
            output, _ = process.communicate(timeout=60)
            self.assertEqual(process.returncode, code, output)
            self.assertIn(f"go on with:\n  dsv3 train {self.run_directory}\n", output)
            self.assertEqual(len(self.steps()), 1)
            self.assert_verified()
            self.assertEqual(self.events("stopped")[-1]["reason"], "requested")

    def test_sigusr1_saves_and_goes_on(self):
        process = self.start("checkpoint.every_steps=0")
        process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not self.events("checkpoint"):
            time.sleep(0.02)
        self.assertIsNone(process.poll())
        self.assertEqual(len(self.steps()), 1)
        process.kill()
        process.communicate()
        self.assert_verified()

    def test_the_time_limit_saves_before_it(self):
        start = time.monotonic()
        result = self.train("--steps", "1000000", "--time-limit", "00:00:05", "checkpoint.every_steps=0")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn(f"go on with:\n  dsv3 train {self.run_directory}\n", result.stdout)
        self.assertEqual(len(self.steps()), 1)
        self.assert_verified()
        for wrong in ("5", "1:xx", "00:00:00", "", "1:2:3:4"):
            self.assert_error(self.train(f"--time-limit={wrong}"), 2, "--time-limit")

    def test_a_finished_run_says_how_it_is_lengthened(self):
        self.assertEqual(self.train("training.steps=6").returncode, 0)
        result = self.train()
        self.assertEqual(result.returncode, 0)
        self.assertIn("is finished: 6 of 6 steps are done", result.stdout)
        self.assertIn(f"dsv3 train {self.run_directory} --steps", result.stdout)
        # Inside the run's directory, the run here is meant.
        here = subprocess.run([DSV3, "train"], cwd=self.run_directory, capture_output=True, text=True)
        self.assertEqual((here.returncode, "is finished" in here.stdout), (0, True), here.stderr)
        here = subprocess.run([DSV3, "train", "--steps", "8"], cwd=self.run_directory, capture_output=True, text=True)
        self.assertEqual(here.returncode, 0, here.stderr)
        self.assertEqual(self.steps()[-1], 8)
        result = run(DSV3, "train", self.config, "--out", self.run_directory, "model.hidden_size=32")
        self.assert_error(result, 2, "model.hidden_size: 64 in the run, 32 now", "--out", "--overwrite")

    def test_commands_on_checkpoints_refuse_what_is_none(self):
        self.assert_error(run(DSV3, "checkpoint", "list", self.directory), 2, "neither a run")
        self.assert_error(run(DSV3, "checkpoint", "list", self.directory / "nowhere"), 1, "nowhere")
        self.assertEqual(self.train("training.steps=6").returncode, 0)
        self.assert_error(run(DSV3, "checkpoint", "verify", self.run_directory, "--step", "4"), 2, "step 4")
        shown = run(DSV3, "checkpoint", "inspect", self.run_directory, "--tensors")
        self.assertEqual(shown.returncode, 0)
        self.assertRegex(shown.stdout, r"(?m)^  step +6 \(finished\)$")
        self.assertRegex(shown.stdout, r"(?m)^    exp_avg\.model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight +F32 +\[64, 32\]$")


if __name__ == "__main__":
    DSV3, words = suite.arguments()
    suite.main(words)
