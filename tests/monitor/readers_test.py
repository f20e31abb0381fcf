#!/usr/bin/env python3
"""Holds what a run writes to what others read of it: TensorBoard's own reader, Prometheus' parser, the official client
of Weights & Biases; and docs/metrics.md to src/monitor/metrics.h.

Usage: readers_test.py --dump PATH/monitor_dump --dsv3 PATH/dsv3. Cases whose reader is not installed are skipped
(scripts/setup.sh --tests installs all). The last line is the total.
"""
import argparse
import importlib.util
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BRIDGE = ROOT / "scripts" / "wandb_bridge.py"
DUMP = DSV3 = ""
DISTRIBUTION = "moe/expert_distribution"
TINY = """
model: {num_layers: 3, hidden_size: 32, max_position_embeddings: 64, dtype: fp32,
        mla: {num_heads: 2, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8},
        moe: {num_experts: 4, num_experts_per_token: 2, moe_intermediate_size: 16}, mtp: {num_nextn_predict_layers: 1}}
data: {train: TEXT, document_split: line, validation_every: 3, sequence_length: 16, num_workers: 1}
training: {steps: 12, micro_batch_size: 2, global_batch_size: 4, eval_every: 5, device: cpu, num_threads: 1, sample_tokens: 0}
monitor: {tensorboard: true, wandb: true, prometheus: RUN/node.prom, per_layer_every: 5}
"""


def needs(module):
    return unittest.skipUnless(importlib.util.find_spec(module), f"Python here has no {module} (scripts/setup.sh --tests)")


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=300, **options)
    if done.returncode != 0:
        raise AssertionError(f"{command[0]} exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def float32(value):
    return struct.unpack("f", struct.pack("f", math.nan if value is None else value))[0]


def expected_scalars(lines):
    """{name: {step: value}} after TensorBoard has dropped what a later session wrote again."""
    found, last = {}, 0
    for line in lines:
        if "event" in line:
            continue
        if line["step"] < last:
            for points in found.values():
                for step in [step for step in points if step >= line["step"]]:
                    del points[step]
        last = line["step"]
        for name, value in line.items():
            if name not in ("time", "step", DISTRIBUTION):
                found.setdefault(name, {})[line["step"]] = float32(value)
    return found


def expected_histograms(lines):
    """{tag: {step: counts by expert}}, with the same dropping."""
    found, last = {}, 0
    for line in lines:
        if "event" in line:
            continue
        if line["step"] < last:
            for points in found.values():
                for step in [step for step in points if step >= line["step"]]:
                    del points[step]
        last = line["step"]
        if DISTRIBUTION not in line:
            continue
        layers = [name.rsplit("_", 1)[1] for name in line if re.match(r"moe/max_vio/layer_", name)]
        assert len(layers) == len(line[DISTRIBUTION])
        for layer, counts in zip(layers, line[DISTRIBUTION]):
            found.setdefault(f"{DISTRIBUTION}/layer_{layer}", {})[line["step"]] = counts
        found.setdefault(DISTRIBUTION, {})[line["step"]] = [sum(column) for column in zip(*line[DISTRIBUTION])]
    return found


def dumped(directory):
    seed = int(os.environ.get("DSV3_TEST_SEED", random.randrange(2**32)))
    print(f"monitor_dump: DSV3_TEST_SEED={seed}")
    run(DUMP, directory, seed)
    return lines_of(directory)


def trained(directory, **options):
    """A real run with every sink; Weights & Biases offline, through this Python."""
    text = directory / "text.txt"
    text.write_text("in the beginning was the word\nand the word was in the beginning\n" * 40)
    config = directory / "config.yaml"
    config.write_text(TINY.replace("TEXT", str(text)).replace("RUN", str(directory)))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"WANDB_MODE": "offline", "PATH": path} | options
    done = run(DSV3, "train", config, "--out", directory / "run", env=environment)
    return directory / "run", done.stdout


class TensorBoard(unittest.TestCase):
    def check(self, directory, lines):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        reader = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
        reader.Reload()
        scalars, histograms = expected_scalars(lines), expected_histograms(lines)
        self.assertEqual(set(reader.Tags()["scalars"]), set(scalars))
        for name, points in scalars.items():
            read = {event.step: event.value for event in reader.Scalars(name)}
            self.assertEqual(set(read), set(points), name)
            for step, value in points.items():
                same = read[step] == value or (math.isnan(value) and math.isnan(read[step]))
                self.assertTrue(same, f"{name} at {step}: {read[step]}, expected {value}")
        self.assertEqual(set(reader.Tags()["histograms"]), set(histograms))
        for name, points in histograms.items():
            read = {event.step: event.histogram_value for event in reader.Histograms(name)}
            self.assertEqual(set(read), set(points), name)
            for step, counts in points.items():
                value, ids = read[step], range(len(counts))
                self.assertEqual(list(value.bucket), counts)
                self.assertEqual(list(value.bucket_limit), [i + 0.5 for i in ids])
                self.assertEqual((value.min, value.max, value.num), (-0.5, len(counts) - 0.5, sum(counts)))
                self.assertEqual(value.sum, sum(i * counts[i] for i in ids))
                self.assertEqual(value.sum_squares, sum(i * i * counts[i] for i in ids))
        times = [event.wall_time for name in scalars for event in reader.Scalars(name)]
        self.assertLess(abs(max(times) - time.time()), 3600)
        return reader

    @needs("tensorboard")
    def test_every_scalar_and_histogram_of_a_resumed_run(self):
        with tempfile.TemporaryDirectory() as directory:
            lines = dumped(Path(directory))
            self.assertEqual(len(list(Path(directory, "tensorboard").iterdir())), 2, "a file for each process")
            self.check(Path(directory), lines)

    @needs("tensorboard")
    def test_the_dashboards_reader_of_histograms_agrees(self):
        """The multiplexer, which the web page asks, converts every summary to tensors first."""
        from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
        from tensorboard.util import tensor_util

        with tempfile.TemporaryDirectory() as directory:
            expected = expected_histograms(dumped(Path(directory)))
            reader = EventMultiplexer(tensor_size_guidance={"histograms": 0})
            reader.AddRun(str(Path(directory, "tensorboard")), "run")
            reader.Reload()
            for name, points in expected.items():
                for event in reader.Tensors("run", name):
                    edges = [(i - 0.5, i + 0.5, float(count)) for i, count in enumerate(points[event.step])]
                    read = [tuple(row) for row in tensor_util.make_ndarray(event.tensor_proto).tolist()]
                    self.assertEqual(read, edges)

    @needs("tensorboard")
    def test_hyperparameters(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugins.hparams import metadata

        with tempfile.TemporaryDirectory() as directory:
            dumped(Path(directory))
            reader = EventAccumulator(str(Path(directory, "tensorboard")))
            reader.Reload()
            content = reader.PluginTagToContent("hparams")
            start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
            values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
            self.assertEqual(values["model.num_layers"], 12)
            self.assertEqual(values["optimizer.learning_rate"], 2.2e-4)
            self.assertIs(values["monitor.tensorboard"], True)
            self.assertEqual(values["training.device"], "auto")
            self.assertIn("quotes.txt", values["data.train"])
            experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
            self.assertEqual({info.name for info in experiment.hparam_infos}, set(values))
            self.assertIn("train/loss", [info.name.tag for info in experiment.metric_infos])


class Prometheus(unittest.TestCase):
    @needs("prometheus_client")
    def test_the_official_parser_finds_the_newest_values(self):
        from prometheus_client.parser import text_string_to_metric_families

        with tempfile.TemporaryDirectory() as directory:
            lines = dumped(Path(directory))
            text = Path(directory, "node.prom").read_text()
            newest = {}
            for line in lines[next(i for i, line in enumerate(lines) if i and line["step"] < lines[i - 1]["step"]):]:
                newest.update({k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "time" and "event" not in line})
            read = {}
            for family in text_string_to_metric_families(text):
                self.assertEqual(family.type, "gauge")
                for sample in family.samples:
                    labels = dict(sample.labels)
                    self.assertEqual(labels.pop("run"), Path(directory).name)
                    suffix = "".join(f"/{key}_{value}" for key, value in labels.items())
                    read[sample.name.removeprefix("dsv3_") + suffix] = sample.value
            expected = {re.sub(r"/(?!layer_|depth_)", "_", name): value for name, value in newest.items()}
            self.assertEqual(read, expected)


def wandb_records(run_directory):
    """Every record of the client's offline files: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(run_directory.glob("wandb/offline-run-*/run-*.wandb")):
        data, at, part = path.read_bytes(), 7, b""
        assert data[:4] == b":W&B", data[:8]
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            part += data[at + 7:at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # the whole of a record, or its last part
                record = wandb_internal_pb2.Record()
                record.ParseFromString(part)
                part = b""
                yield record


def wandb_history(run_directory):
    """The logged points, as {name: value}; a histogram is a dictionary."""
    for record in wandb_records(run_directory):
        if record.WhichOneof("record_type") != "history":
            continue
        point = {}
        for item in record.history.item:
            name, *rest = item.nested_key or [item.key]
            if rest:
                point.setdefault(name, {})[rest[0]] = json.loads(item.value_json)
            else:
                point[name] = json.loads(item.value_json)
        yield point


class WeightsAndBiases(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.run = Path(self.directory.name)
        self.environment = os.environ | {"WANDB_MODE": "offline"}

    def check(self, directory, lines):
        points = list(wandb_history(directory))
        self.assertEqual(len(points), len(lines))
        seen = {}
        for line, point in zip(lines, points):
            self.assertEqual(point["step"], line["step"])
            if "event" in line:
                seen[line["event"]] = seen.get(line["event"], 0) + 1
                self.assertEqual(point[f"events/{line['event']}"], seen[line["event"]])
                continue
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "time":
                    self.assertEqual(point[name], value, name)
            for name, counts in expected_histograms([line]).items():
                self.assertEqual(point[name]["values"], counts[line["step"]])
                self.assertEqual(point[name]["_type"], "histogram")
                self.assertEqual(point[name]["bins"], [i - 0.5 for i in range(len(counts[line["step"]]) + 1)])

    @needs("wandb")
    def test_an_offline_run_holds_every_line_once_however_often_it_is_sent(self):
        lines = dumped(self.run)
        for _ in range(2):
            run(sys.executable, BRIDGE, self.run, env=self.environment)
            self.check(self.run, lines)
        with open(self.run / "metrics.jsonl", "a") as file:
            last = lines[-1] | {"time": lines[-1]["time"] + 1, "step": 13}
            file.write(json.dumps(last) + "\n")
        run(sys.executable, BRIDGE, self.run, env=self.environment)
        self.check(self.run, lines + [last])

    @needs("wandb")
    def test_a_bridge_that_follows_sends_what_comes_and_ends_with_its_trainer(self):
        lines = dumped(self.run)
        text = (self.run / "metrics.jsonl").read_text()
        (self.run / "metrics.jsonl").write_text(text[:100])  # half a line
        bridge = subprocess.Popen([sys.executable, BRIDGE, self.run, "--with-trainer"], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=self.environment)
        with open(self.run / "metrics.jsonl", "a") as file:
            for start in range(100, len(text), 5000):
                file.write(text[start:start + 5000])
                file.flush()
                time.sleep(0.3)
        output = bridge.communicate(timeout=120)[0]  # closes its input
        self.assertEqual(bridge.returncode, 0, output)
        self.check(self.run, lines)

    @needs("wandb")
    def test_a_clock_that_was_set_back_and_a_broken_line_lose_nothing(self):
        lines = dumped(self.run)
        for number, line in enumerate(lines):
            line["time"] = 2000.0 + number - (1000 if number >= len(lines) // 2 else 0)
        text = "".join(json.dumps(line) + "\n" for line in lines[:-1])
        (self.run / "metrics.jsonl").write_text(text + '{"time": 5, "st\n')
        run(sys.executable, BRIDGE, self.run, env=self.environment)
        self.check(self.run, lines[:-1])
        with open(self.run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        run(sys.executable, BRIDGE, self.run, env=self.environment)
        self.check(self.run, lines)

    @needs("wandb")
    def test_a_bridge_follows_a_run_that_went_back(self):
        lines = dumped(self.run)
        bridge = subprocess.Popen([sys.executable, BRIDGE, self.run, "--with-trainer"], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=self.environment)
        deadline = time.monotonic() + 60
        while len(list(wandb_history(self.run))) == 0 and time.monotonic() < deadline:
            time.sleep(0.3)
        time.sleep(2)  # the lines are read; the bridge waits at the file's end
        again = [line | {"time": line["time"] + 1000} for line in lines[-3:]]
        (self.run / "new").write_text("".join(json.dumps(line) + "\n" for line in lines[:-3] + again))
        (self.run / "new").rename(self.run / "metrics.jsonl")
        time.sleep(3)
        output = bridge.communicate(timeout=120)[0]
        self.assertEqual(bridge.returncode, 0, output)
        self.check(self.run, lines + again)

    def test_a_directory_that_is_no_run_is_named(self):
        done = subprocess.run([sys.executable, BRIDGE, self.run], capture_output=True, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"metrics\.jsonl is not there")

    @needs("wandb")
    @needs("tensorboard")
    def test_a_trained_run_in_every_sink(self):
        run_directory, output = trained(self.run)
        self.assertNotIn("warning", output)
        lines = lines_of(run_directory)
        self.assertEqual(len([line for line in lines if "train/loss" in line]), 12)
        self.check(run_directory, lines)
        reader = TensorBoard().check(run_directory, lines)
        self.assertEqual([event.step for event in reader.Histograms(DISTRIBUTION + "/layer_3")], [1, 5, 10])
        config = {}
        for record in wandb_records(run_directory):
            if record.WhichOneof("record_type") == "run":
                config.update({item.key: item.value_json for item in record.run.config.update})
        self.assertEqual(json.loads(config["model"])["num_layers"], 3)
        self.assertIn('dsv3_train_loss{run="run"} ', (self.run / "node.prom").read_text())

    def test_without_the_client_there_is_one_warning_and_the_run_goes_on(self):
        if (ROOT / "third_party/python/bin/python").exists() and subprocess.run(
                [ROOT / "third_party/python/bin/python", "-c", "import wandb"], capture_output=True).returncode == 0:
            self.skipTest("the set-up's Python has wandb, which is found first")
        (self.run / "bin").mkdir()
        run_directory, output = trained(self.run, PATH=str(self.run / "bin"))
        warnings = [line for line in output.splitlines() if "warning" in line]
        self.assertEqual(len(warnings), 1, output)
        self.assertRegex(warnings[0], r"monitor\.wandb: nothing is sent: no python3 with the module wandb")
        self.assertEqual(len(list(run_directory.glob("wandb/*"))), 0)


class Documents(unittest.TestCase):
    def test_every_metric_stands_in_docs_metrics(self):
        header = (ROOT / "src/monitor/metrics.h").read_text()
        names = re.findall(r'constexpr const char\* k\w+ = "([^"]+)"', header)
        self.assertGreater(len(names), 35)
        documented = re.findall(r"(?m)^\| `([a-z_]+/[a-z_]+)` \|", (ROOT / "docs/metrics.md").read_text())
        self.assertEqual(sorted(documented), sorted(names))


def main():
    global DUMP, DSV3
    parser = argparse.ArgumentParser()
    parser.add_argument("--dump", required=True)
    parser.add_argument("--dsv3", required=True)
    arguments, rest = parser.parse_known_args()
    DUMP, DSV3 = Path(arguments.dump).resolve(), Path(arguments.dsv3).resolve()
    result = unittest.main(argv=[sys.argv[0], *rest], exit=False).result
    failed, skipped = len(result.failures) + len(result.errors), len(result.skipped)
    print(f"{max(0, result.testsRun - failed - skipped)} passed, {failed} failed, {skipped} skipped", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
