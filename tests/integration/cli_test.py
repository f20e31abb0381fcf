"""The program's command line and the scripts around it, from outside: exit codes, messages, pipes.

Usage: cli_test.py --dsv3 PATH. Ends with `N passed, N failed, N skipped`. Needs Python's standard library only.
"""
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import suite

ROOT = Path(__file__).resolve().parents[2]
DSV3 = ""
COMMANDS = ["train", "config", "plan", "checkpoint", "report", "eval", "generate", "data", "bench", "verify"]


def run(*command, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300, "cwd": ROOT} | options
    return subprocess.run([str(word) for word in command], text=True, stdin=subprocess.DEVNULL, **options)


def run_beside_terminal(*command):
    """What the command writes to a pipe as its stdout, and to a terminal as its stderr."""
    leader, terminal = pty.openpty()
    with os.fdopen(leader, "rb", buffering=0) as shown:
        with subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal, cwd=ROOT) as child:
            os.close(terminal)
            text = b""
            try:
                while piece := shown.read(4096):
                    text += piece
            except OSError:  # how Linux says that nobody holds the terminal any more
                pass
            return child.stdout.read().decode(), text.decode()


class Program(unittest.TestCase):
    def assert_one_sentence(self, result, code, *words):
        """Fails unless stderr is one line `dsv3: error: …` that holds all words."""
        self.assertEqual(result.returncode, code, result.stderr)
        self.assertRegex(result.stderr, r"\Adsv3: error: [^\n]+\n\Z")
        for word in words:
            self.assertIn(word, result.stderr)

    def test_help_names_every_command(self):
        result = run(DSV3, "--help")
        self.assertEqual(result.returncode, 0)
        for command in COMMANDS:
            self.assertRegex(result.stdout, rf"(?m)^  {command} ")
        self.assertIn("Examples:", result.stdout)

    def test_every_command_has_help_with_examples(self):
        for command in COMMANDS:
            with self.subTest(command):
                result = run(DSV3, command, "--help")
                self.assertEqual((result.returncode, result.stderr), (0, ""))
                text = result.stdout if command != "data" else run(DSV3, "data", "tokenize", "--help").stdout
                self.assertIn("Examples:", text)

    def test_version(self):
        result = run(DSV3, "--version")
        self.assertEqual(result.returncode, 0)
        self.assertRegex(result.stdout, r"\Adsv3 \d+\.\d+\.\d+ \(\w+, (g\+\+|clang) [\d.]+, LibTorch \d+\.\d+\.\d+, (CPU only|CUDA [\d.]+)\)\n\Z")

    def test_without_arguments_it_shows_help_and_fails(self):
        result = run(DSV3)
        self.assertEqual((result.returncode, result.stdout), (2, ""))
        self.assertIn("Usage: dsv3", result.stderr)

    def test_mistyped_command_and_option(self):
        self.assert_one_sentence(run(DSV3, "trian"), 2, "'trian'", "did you mean 'train'?")
        self.assert_one_sentence(run(DSV3, "xyzzy"), 2, "'xyzzy'", "train", "verify")
        self.assert_one_sentence(run(DSV3, "verify", "--nope"), 2, "--nope", "dsv3 verify --help")
        self.assert_one_sentence(run(DSV3, "train"), 2, "config", "dsv3 train --help")
        for wrong in ("0", "-3", "1.5", "many", "99999999999999999999"):
            self.assert_one_sentence(run(DSV3, "train", "x.yaml", f"--steps={wrong}"), 2, "--steps",
                                     f"expected a whole number from 1 on, got '{wrong}'")

    def test_missing_files(self):
        for command in ("train", "config", "plan"):
            with self.subTest(command):
                self.assert_one_sentence(run(DSV3, command, "no/such.yaml"), 1, "no/such.yaml", "No such file")
        result = run(DSV3, "generate", "no/such/run", "--prompt", "x")
        self.assertIn(result.returncode, (1, 2))
        self.assertRegex(result.stderr, r"\Adsv3: error: [^\n]*no/such/run[^\n]*\n\Z")

    def test_config_errors_all_at_once_with_places(self):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "broken.yaml"
            path.write_text("model:\n  num_layer: 3\ntraining:\n  steps: many\n")
            result = run(DSV3, "config", path)
        self.assertEqual((result.returncode, result.stdout), (2, ""))
        *errors, last = result.stderr.splitlines()
        self.assertEqual(len(errors), 2, result.stderr)
        self.assertRegex(errors[0], rf"^{re.escape(str(path))}:2:3: .*num_layer.*num_layers")
        self.assertRegex(errors[1], rf"^{re.escape(str(path))}:4:\d+: .*steps.*many")
        self.assertEqual(last, "dsv3: error: 2 errors in the config")

    def test_config_prints_yaml_that_loads_to_itself(self):
        config = ROOT / "configs" / "deepseek_v3_tiny.yaml"
        first = run(DSV3, "config", config, "training.steps=1900")
        self.assertEqual((first.returncode, first.stderr), (0, ""))
        self.assertRegex(first.stdout, r"(?m)^  steps: 1900$")
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "again.yaml"
            path.write_text(first.stdout)
            self.assertEqual(run(DSV3, "config", path).stdout, first.stdout)

    def test_layouts_of_more_processes_are_planned_but_not_trained(self):
        config = ROOT / "configs" / "deepseek_v3_tiny.yaml"
        layout = "parallel.tensor_parallel_size=2"
        self.assertEqual(run(DSV3, "plan", config, layout).returncode, 0)
        with tempfile.TemporaryDirectory() as directory:
            result = run(DSV3, "train", config, layout, "--out", Path(directory) / "run")
        self.assert_one_sentence(result, 2, "tp(2)", "parallel.tensor_parallel_size=1")

    def test_a_reader_that_stops_early_is_no_error(self):
        for command in ("--help", "verify --no-self-test"):
            with self.subTest(command):
                result = run("bash", "-c", f"set -o pipefail; '{DSV3}' {command} | head -c 1 >/dev/null")
                self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_a_full_disk_is_an_error(self):
        with open("/dev/full", "w") as full:
            result = run(DSV3, "verify", "--no-self-test", stdout=full)
        self.assertEqual(result.returncode, 1)
        self.assertIn("No space left", result.stderr)

    def test_verify_checks_every_operator_and_colours_nothing_in_a_file(self):
        result = run(DSV3, "verify")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        for row in ("compiler", "LibTorch", "CPU", "threads", "CUDA", "GPU", "cuDNN", "NCCL", "MPI"):
            self.assertRegex(result.stdout, rf"(?m)^  {row} +(on|off) +\S")
        for operator in ("rms_norm", "attention", "grouped_linear", "route", "combine", "head_cross_entropy"):
            self.assertRegex(result.stdout, rf"(?m)^  {operator} +cpu +fp32 .* ok")
        self.assertNotIn("\033", result.stdout)


TINY = """
model: {dtype: fp32, num_layers: 2, hidden_size: 32, intermediate_size: 48, max_position_embeddings: 64,
        mla: {num_heads: 2, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8},
        moe: {num_experts: 4, num_experts_per_token: 2, moe_intermediate_size: 16},
        mtp: {num_nextn_predict_layers: 1}}
data: {train: [TEXT], document_split: line, validation_every: 3, sequence_length: 16, num_workers: 1}
training: {steps: 6, micro_batch_size: 2, global_batch_size: 4, device: cpu, num_threads: 1, sample_tokens: 0}
optimizer: {learning_rate: 3.0e-3}
"""


class Faults(unittest.TestCase):
    """A run's average, its replay, and its end when numbers stay bad."""

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.directory = Path(self.temporary.name)
        text = self.directory / "text.txt"
        text.write_text("in the beginning was the word\nand the word was in the beginning\n" * 30)
        self.config = self.directory / "tiny.yaml"
        self.config.write_text(TINY.replace("TEXT", str(text)))

    def train(self, name, *overrides):
        out = self.directory / name
        return out, run(DSV3, "train", self.config, *overrides, "--out", out)

    def test_average_and_replay(self):
        out, result = self.train("run", "training.ema.decay=0.9", "training.ema.evaluate=true", "checkpoint.every_steps=2")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn("averaged weights: loss", result.stdout)
        losses = [json.loads(run(DSV3, "eval", out, "--json", *words).stdout)["loss"] for words in ([], ["--ema"])]
        self.assertNotEqual(*losses)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "eval/ema_loss" in line][-1]
        for loss, key in zip(losses, ("eval/loss", "eval/ema_loss")):
            self.assertAlmostEqual(loss, last[key], delta=1e-4 * loss)
        self.assertEqual(run(DSV3, "generate", out, "--ema", "--tokens", 4).returncode, 0)

        before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
        replay = run(DSV3, "train", out, "--replay", 5)
        self.assertEqual((replay.returncode, replay.stderr), (0, ""))
        self.assertIn("step 5, replayed from the checkpoint of step 4", replay.stdout)
        self.assertIn("every number of this step is finite", replay.stdout)
        self.assertRegex(replay.stdout, r"(?m)^ +1  moe +[\d.e+-]+ +[\d.e+-]+ +0$")
        self.assertEqual(sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")), before)
        wrong = run(DSV3, "train", out, "--replay", 4, "--steps", 9)
        self.assertEqual(wrong.returncode, 2)
        self.assertIn("--device alone", wrong.stderr)

    def test_bad_numbers_that_stay_end_the_run(self):
        out, result = self.train("bad", "optimizer.learning_rate=1e9", "training.max_skipped_steps=3")
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, r"\Adsv3: error: the last 3 steps up to 4 were all skipped[^\n]+--replay 4[^\n]+\n\Z")
        events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "event" in line]
        skipped = [event for event in events if event["event"] == "skipped_step"]
        self.assertEqual([event["step"] for event in skipped], [2, 3, 4])
        self.assertEqual([len(event["samples"]) for event in skipped], [4, 4, 4])
        self.assertEqual(list((out / "checkpoints").iterdir()), [])


class Bench(unittest.TestCase):
    assert_one_sentence = Program.assert_one_sentence

    def names(self):
        result = run(DSV3, "bench", "op", "--list")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return [line.split()[0] for line in result.stdout.splitlines()]

    def test_list_names_every_family_once(self):
        names = self.names()
        self.assertEqual(len(names), len(set(names)))
        for name in ("rms_norm_forward", "rms_norm_backward", "swiglu_forward", "rope_query_forward", "cross_entropy",
                     "embedding_backward", "route_forward", "permute_forward", "combine_backward", "adamw"):
            self.assertIn(name, names)

    def test_plans_state_the_sizes_of_all_three_models(self):
        result = run(DSV3, "bench", "op", "rms_norm_forward", "--dry-run", "--tokens", 10, "--dtype", "fp32", "--device", "cpu")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        plans = {plan["shape"]: plan for plan in map(json.loads, result.stdout.splitlines())}
        self.assertEqual({name: plan["dims"]["D"] for name, plan in plans.items()}, {"v3": 7168, "lite12": 2048, "small": 1024})
        # x and y, the weight, 1/rms of each row.
        self.assertEqual(plans["small"]["bytes"], 4 * (2 * 10 * 1024 + 1024 + 10))

    def test_every_operator_gives_a_line_for_each_way(self):
        names = self.names()
        for dtype in ("fp32", "bf16"):
            with self.subTest(dtype):
                result = run(DSV3, "bench", "op", "--shape", "small", "--tokens", 5, "--rounds", 1, "--device", "cpu",
                             "--dtype", dtype, "--seed", 7, "--table")
                self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
                rows = [json.loads(line) for line in result.stdout.splitlines()]
                self.assertEqual([(row["op"], row["way"]) for row in rows],
                                 [(name, way) for name in names for way in ("ours", "composed")])
                for row in rows:
                    self.assertNotIn("error", row)
                    self.assertEqual((row["shape"], row["dtype"], row["seed"], row["timed"]), ("small", dtype, 7, "clock"))
                    self.assertTrue(0 < row["min_us"] <= row["median_us"], row)
                    self.assertAlmostEqual(row["gbps"], row["bytes"] / row["median_us"] / 1e3, delta=2e-3 * row["gbps"])
                    self.assertAlmostEqual(row["percent_of_copy"], 100 * row["gbps"] / row["copy_gbps"],
                                           delta=3e-3 * row["percent_of_copy"])
                for name in names:
                    self.assertRegex(result.stderr, rf"(?m)^{name} +small ")

    def test_a_word_selects_what_begins_with_it(self):
        result = run(DSV3, "bench", "op", "rms_norm", "swiglu_forward", "--dry-run", "--shape", "small", "--device", "cpu")
        picked = [json.loads(line)["op"] for line in result.stdout.splitlines()]
        self.assertEqual(picked, [name for name in self.names() if name.startswith("rms_norm_") or name == "swiglu_forward"])
        self.assertGreater(len(picked), 2)

    def test_wrong_names_and_options(self):
        self.assert_one_sentence(run(DSV3, "bench", "op", "swiglu_foward"), 2, "'swiglu_foward'", "did you mean 'swiglu_forward'?")
        self.assert_one_sentence(run(DSV3, "bench", "op", "xyzzy"), 2, "'xyzzy'", "--list")
        self.assert_one_sentence(run(DSV3, "bench", "op", "--shape", "huge"), 2, "huge", "lite12")
        self.assert_one_sentence(run(DSV3, "bench", "op", "--tokens", "0"), 2, "--tokens")
        self.assert_one_sentence(run(DSV3, "bench"), 2, "dsv3 bench --help")


class Scripts(unittest.TestCase):
    def test_every_script_has_help(self):
        for script in sorted((ROOT / "scripts").glob("*.sh")):
            if script.name == "lib.sh":
                continue
            with self.subTest(script.name):
                result = run(script, "--help")
                self.assertEqual((result.returncode, result.stderr), (0, ""))
                self.assertIn(f"scripts/{script.name}", result.stdout)

    def test_wrong_arguments_give_one_sentence(self):
        for command in ("setup.sh --nope", "build_kernels.sh --nope", "format.sh --nope", "fetch_text.sh nope",
                        "train.sh no/such.yaml", "train.sh deepseek_v3_tiny.yaml"):
            script, argument = command.split()
            with self.subTest(command):
                result = run(ROOT / "scripts" / script, argument)
                self.assertEqual((result.returncode, result.stdout), (1, ""))
                self.assertRegex(result.stderr, rf"\A{re.escape(script)}: error: [^\n]+\n\Z")

    def test_gpu_session_says_what_it_needs(self):
        script = ROOT / "bench" / "gpu_session.sh"
        help_text = run(script, "--help")
        self.assertEqual((help_text.returncode, help_text.stderr), (0, ""))
        with tempfile.TemporaryDirectory() as directory:
            wrong = [[], [directory, "--nope"], [directory, "--parts", "nope"], [directory, "--bin", directory], [directory, directory]]
            if not os.path.exists("/dev/nvidia0"):
                wrong.append([directory, "--bin", Path(DSV3).parent])
            for arguments in wrong:
                with self.subTest(arguments):
                    result = run(script, *arguments)
                    self.assertEqual((result.returncode, result.stdout), (1, ""))
                    self.assertRegex(result.stderr, r"\Agpu_session.sh: error: [^\n]+\n\Z")

    def test_setup_refuses_a_directory_without_libtorch(self):
        with tempfile.TemporaryDirectory() as copy:
            run("cp", "-r", ROOT / "scripts", copy)
            result = run(f"{copy}/scripts/setup.sh", env=os.environ | {"LIBTORCH": copy})
            self.assertEqual(result.returncode, 1)
            self.assertRegex(result.stderr, r"LIBTORCH=\S+ holds no include/ATen/core/Tensor.h")
            self.assertFalse((Path(copy) / "third_party" / "libtorch").exists())


class Layers(unittest.TestCase):
    def check(self, files):
        with tempfile.TemporaryDirectory() as root:
            for name, text in files.items():
                path = Path(root) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            return run(sys.executable, ROOT / "tools" / "check_layers.py", root)

    def test_the_source_keeps_to_the_table(self):
        result = run(sys.executable, ROOT / "tools" / "check_layers.py")
        self.assertEqual(result.returncode, 0, result.stdout)

    def test_each_violation_is_named_with_its_place(self):
        cases = {
            "src/base/a.h": ('#include "config/config.h"', "base may include only itself"),
            "src/config/b.h": ("#include <ATen/core/Tensor.h>", "config sees no LibTorch"),
            "src/kernels/c.cu": ("#include <c10/util/Exception.h>", "CUDA sources know nothing of LibTorch"),
            "src/ops/d.cpp": ("#include <torch/torch.h>", "torch/torch.h is banned"),
            "src/nn/e.cpp": ("struct X : torch::nn::Module {};", "torch::nn is banned"),
            "src/nn/f.cpp": ('#include "parameter.h"', "paths start at src/"),
            "src/other/g.cpp": ("", "no room called other"),
            "tests/ops/h.cpp": ("#include <ATen/ATen.h>", "ATen/ATen.h is banned"),
            "src/kernels/i.cu": ("#include <thrust/sort.h>", "narrow CUB header"),
            "bench/ops/j.cpp": ('#include "training/trainer.h"', "bench may include only"),
        }
        for name, (line, reason) in cases.items():
            with self.subTest(name):
                result = self.check({name: line + "\n"})
                self.assertEqual(result.returncode, 1)
                self.assertRegex(result.stdout, rf"(?m)^{re.escape(name)}:1: .*{re.escape(reason)}")

    def test_allowed_includes_pass(self):
        result = self.check({"src/ops/a.cpp": '#include "ops/a.h"\n#include "kernels/k.h"\n#include <ATen/ops/mm.h>\n'})
        self.assertEqual(result.returncode, 0, result.stdout)


class Totals(unittest.TestCase):
    def count(self, ctest, reports):
        with tempfile.TemporaryDirectory() as directory:
            junit = Path(directory) / "ctest.xml"
            junit.write_text(f"<testsuite>{ctest}</testsuite>")
            for name, cases in reports.items():
                (Path(directory) / f"{name}.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
            result = run(sys.executable, ROOT / "tools" / "count_tests.py", junit, directory)
        return result.returncode, result.stdout.splitlines()[-1]

    PASSED = '<testcase name="p" classname="S" status="run" result="completed"/>'
    FAILED = '<testcase name="f" classname="S" status="run" result="completed"><failure message="x"/></testcase>'
    SKIPPED = '<testcase name="s" classname="S" status="run" result="skipped"><skipped message="no GPU"/></testcase>'

    def test_cases_are_added_up(self):
        run_ok = '<testcase name="a_test" status="run"/><testcase name="plain" status="run"/>'
        self.assertEqual(self.count(run_ok, {"a_test": self.PASSED * 3 + self.SKIPPED}), (0, "4 passed, 0 failed, 1 skipped"))
        failed = '<testcase name="a_test" status="fail"/>'
        self.assertEqual(self.count(failed, {"a_test": self.PASSED + self.FAILED}), (1, "1 passed, 1 failed, 0 skipped"))

    def test_what_did_not_run_or_crashed_has_failed(self):
        crashed = '<testcase name="a_test" status="fail"><system-out>Segfault</system-out></testcase>'
        self.assertEqual(self.count(crashed, {"a_test": self.PASSED}), (1, "1 passed, 1 failed, 0 skipped"))
        self.assertEqual(self.count(crashed, {}), (1, "0 passed, 1 failed, 0 skipped"))
        unbuilt = '<testcase name="a" status="notrun"><skipped message="Unable to find executable"/></testcase>'
        self.assertEqual(self.count(unbuilt, {}), (1, "0 passed, 1 failed, 0 skipped"))
        self.assertEqual(self.count("", {}), (1, "0 passed, 0 failed, 0 skipped"))

    def test_skips_and_totals_of_scripts(self):
        skipped = '<testcase name="a" status="notrun"><skipped message="SKIP_RETURN_CODE=77"/></testcase>'
        totals = '<testcase name="b" status="run"><system-out>x\n5 passed, 0 failed, 2 skipped\n</system-out></testcase>'
        self.assertEqual(self.count(skipped + totals, {}), (0, "5 passed, 0 failed, 3 skipped"))


class TrainedRun(unittest.TestCase):
    """What people do with a run, on one of two steps."""

    @classmethod
    def setUpClass(cls):
        cls.place = tempfile.TemporaryDirectory()
        cls.directory = Path(cls.place.name)
        (cls.directory / "text.txt").write_text("In the beginning was the Word.\n" * 200)
        (cls.directory / "run.yaml").write_text(
            "model: {num_layers: 2, hidden_size: 32, mla: {num_heads: 2, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8,"
            " v_head_dim: 8}, moe: {num_experts: 4, num_experts_per_token: 2}}\n"
            f"data: {{train: {cls.directory}/text.txt, document_split: line, validation_every: 20, sequence_length: 32}}\n"
            "training: {steps: 2, micro_batch_size: 2, global_batch_size: 4, sample_tokens: 4, device: cpu}\n")
        cls.run_directory = cls.directory / "run"
        cls.trained = run(DSV3, "train", cls.directory / "run.yaml", "--out", cls.run_directory)

    @classmethod
    def tearDownClass(cls):
        cls.place.cleanup()

    def eval_tokens(self, text):
        path = self.directory / "tokens.json"
        path.write_text(text)
        return run(DSV3, "eval", self.run_directory, "--tokens", path, "--logits", self.directory / "logits.safetensors", "--device", "cpu")

    def test_it_trains(self):
        self.assertEqual(self.trained.returncode, 0, self.trained.stderr)
        self.assertIn("saved", self.trained.stdout)

    def test_logits_of_tokens(self):
        result = self.eval_tokens("[1, 2, 3]")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertTrue((self.directory / "logits.safetensors").exists())

    def test_bad_tokens_are_one_sentence(self):
        for text in ("", "{}", "[]", "[1.5]", "[-1]", "[264]", "[[1]]", "[1e99]", "[" * 100000, '{"a":' * 100000):
            with self.subTest(text[:10]):
                result = self.eval_tokens(text)
                self.assertEqual(result.returncode, 2, result.stderr[:300])
                self.assertRegex(result.stderr, r"\Adsv3: error: [^\n]*tokens\.json[^\n]*\n\Z")

    def test_eval_of_what_is_not_there(self):
        for target, data in ((self.directory / "nothing", None), (self.directory, None), (self.run_directory, self.directory / "none.txt")):
            with self.subTest(str(data or target)):
                result = run(DSV3, "eval", target, *([data] if data else []), "--device", "cpu")
                self.assertIn(result.returncode, (1, 2))
                self.assertRegex(result.stderr, r"\Adsv3: error: [^\n]+\n\Z")
                self.assertIn(str(data or target), result.stderr)

    def test_eval_shows_its_progress_on_a_terminal_only(self):
        plain = run(DSV3, "eval", self.run_directory, "--device", "cpu", "--json")
        self.assertEqual((plain.returncode, plain.stderr), (0, ""))
        result, shown = run_beside_terminal(DSV3, "eval", self.run_directory, "--device", "cpu", "--json")
        self.assertEqual(json.loads(result)["loss"], json.loads(plain.stdout)["loss"])
        self.assertRegex(shown, r"\A\r\x1b\[K\[-{24}\]   0%  0/\d+ batches  ETA -")
        self.assertTrue(shown.endswith("\r\x1b[K"), repr(shown))  # and takes it away

    def test_generate_prints_the_prompt_and_more(self):
        result = run(DSV3, "generate", self.run_directory, "--prompt", "In the", "--tokens", "5", "--device", "cpu")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertTrue(result.stdout.startswith("In the"))

    def test_a_pipe_is_read_whole(self):
        text = "".join(f"verse {i}\n" for i in range(3000))
        (self.directory / "verses.txt").write_text(text)
        command = f'"{DSV3}" data tokenize <(cat "{self.directory}/verses.txt") --out "{self.directory}/piped.tokens"'
        result = run("bash", "-c", command)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn(f"{len(text):,} tokens", result.stdout)

    def test_tokenize_errors_are_one_sentence(self):
        (self.directory / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
        cases = ((["none.txt"], "none.txt"), (["bad.jsonl"], "bad.jsonl"), (["text.txt", "--tokenizer", "ids:300"], "ids:300"))
        for arguments, word in cases:
            with self.subTest(word):
                result = run(DSV3, "data", "tokenize", *arguments, "--out", "x.tokens", cwd=self.directory)
                self.assertIn(result.returncode, (1, 2))
                self.assertRegex(result.stderr, r"\Adsv3: error: [^\n]+\n\Z")
                self.assertIn(word, result.stderr)
                self.assertFalse((self.directory / "x.tokens").exists())
        result = run(DSV3, "data", "tokenize", "text.txt", "--out", self.run_directory, cwd=self.directory)
        self.assertNotEqual(result.returncode, 0)
        self.assertFalse(Path(f"{self.run_directory}.tmp").exists())


if __name__ == "__main__":
    DSV3, words = suite.arguments()
    suite.main(words)
