"""Opens the pages of `dsv3 report` in headless Chromium: no error in its console, and as many points drawn as the
metrics hold. The page's script tells in data attributes what it drew.

Usage: report_test.py --dsv3 PATH. Ends with `N passed, N failed, N skipped`. Needs Python's standard library, and
Chromium (scripts/setup.sh --tests installs Debian's) for all but the cases of the command line.
"""
import json
import re
import shutil
import subprocess
import tempfile
import unittest
from html.parser import HTMLParser
from pathlib import Path

import suite

DSV3 = ""
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
CONFIG = """
model:
  {num_layers: 3, hidden_size: 64, intermediate_size: 96, dtype: fp32, max_position_embeddings: 64,
   mla: {num_heads: 2, kv_lora_rank: 16, qk_nope_head_dim: 16, qk_rope_head_dim: 8, v_head_dim: 16},
   moe: {num_experts: 4, num_experts_per_token: 2, moe_intermediate_size: 32, first_k_dense_replace: 1}}
data: {train: TEXT, document_split: line, sequence_length: 32, validation_every: 10}
training: {steps: 12, micro_batch_size: 2, global_batch_size: 2, num_threads: 1, device: cpu, sample_tokens: 0, eval_every: 4}
checkpoint: {every_steps: 5}
monitor: {per_layer_every: 3}
"""


def run(*command):
    """Standard output and error apart, as text."""
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)


class Dom(HTMLParser):
    """Every element with its attributes and the text right in it."""

    void = {"meta", "link", "input", "br", "img"}

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        if tag not in self.void:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        if self.open and tag not in self.void:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.open[-1]["text"] += data

    def all(self, tag, **attributes):
        wanted = {key.replace("_", "-"): value for key, value in attributes.items()}
        return [e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in wanted.items())]

    def one(self, tag, **attributes):
        found = self.all(tag, **attributes)
        assert len(found) == 1, f"{len(found)} elements {tag} {attributes}"
        return found[0]


def known_lines(steps=100):
    """Metrics whose points can be counted: a gap at step 50, an evaluation every 20 steps, the loads of 3 layers."""
    lines = []
    for step in range(1, steps + 1):
        line = {"time": 1e9 + 2 * step, "step": step, "train/loss": None if step == 50 else 5 / step + 1, "train/lr": 1e-3,
                "train/tokens": 512 * step, "train/step_time": 1.0, "train/time_forward": 0.25, "train/time_backward": 0.5}
        if step % 10 == 0:
            line["moe/expert_distribution"] = [[10, 20, 30, 40], [25, 25, 25, 25], [100, 0, 0, 0]]
            for layer in (1, 2, 3):
                line[f"moe/max_vio/layer_{layer}"] = 0.1 * layer
        lines.append(line)
        if step % 20 == 0:
            lines.append({"time": 1e9 + 2 * step + 1, "step": step, "eval/loss": 5 / step + 1.1})
    return lines


EVENTS = [{"time": 1e9 + 81, "step": 40, "event": "checkpoint", "path": "checkpoints/step_40"},
          {"time": 1e9 + 161, "step": 80, "event": "checkpoint", "path": "checkpoints/step_80"},
          {"time": 1e9 + 82, "step": 40, "event": "resume", "checkpoint": "checkpoints/step_40"},
          {"time": 1e9 + 100, "step": 50, "event": "skipped_step", "reason": "not_finite"}]


class Runs(unittest.TestCase):
    def setUp(self):
        self.directory = Path(tempfile.mkdtemp(prefix="dsv3_report_"))
        self.run_directory = self.make_run("run", known_lines() + EVENTS)

    def tearDown(self):
        shutil.rmtree(self.directory, ignore_errors=True)

    def make_run(self, name, lines, end=""):
        directory = self.directory / name
        directory.mkdir()
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
        return directory

    def report(self, *arguments):
        result = run(DSV3, "report", *arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result


class Page(Runs):
    def browse(self, page, script=""):
        """The page's console lines and its DOM, after `script` ran behind the page's own."""
        if CHROMIUM is None:
            self.skipTest("no Chromium here (scripts/setup.sh --tests installs it)")
        if script:
            copy = page.with_name("scripted.html")
            copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
            page = copy
        with tempfile.TemporaryDirectory(prefix="dsv3_chromium_") as profile:
            result = run(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                         f"--user-data-dir={profile}", "--window-size=1280,1600", "--enable-logging=stderr",
                         "--virtual-time-budget=5000", "--dump-dom", page.resolve().as_uri())
        self.assertEqual(result.returncode, 0, result.stderr)
        return [line for line in result.stderr.splitlines() if "CONSOLE" in line], Dom(result.stdout)

    def drawn(self, page, script=""):
        """The DOM of a page that must be without a word in the console."""
        console, dom = self.browse(page, script)
        self.assertEqual(console, [])
        self.assertEqual(dom.one("body").get("data-ready"), "true")
        return dom

    def points(self, dom, series, style):
        path = dom.one("path", data_series=series, data_style=style)
        return int(path["data-points"]), int(path["data-segments"])

    def test_the_console_is_really_watched(self):
        self.report(self.run_directory)
        console, _ = self.browse(self.run_directory / "report.html", "nothing.like.this()")
        self.assertEqual(len(console), 1, console)

    def test_every_point_is_drawn(self):
        self.report(self.run_directory)
        dom = self.drawn(self.run_directory / "report.html")
        self.assertEqual(self.points(dom, "train/loss", "raw"), (99, 2))
        self.assertEqual(self.points(dom, "train/loss", "mean"), (99, 2))
        self.assertEqual(self.points(dom, "eval/loss", "dots"), (5, 1))
        self.assertEqual(self.points(dom, "train/lr", "line"), (100, 1))
        self.assertEqual(self.points(dom, "the rest", "area"), (100, 1))
        self.assertEqual(self.points(dom, "layer 2", "line"), (10, 1))
        self.assertEqual(dom.one("figure", data_panel="loss")["data-points"], str(99 + 99 + 5))
        self.assertEqual(dom.one("figure", data_panel="loss")["data-marks"], "4")
        self.assertEqual({e["data-panel"] for e in dom.all("figure") if "data-panel" in e}, {"loss", "lr", "step_time", "max_vio_layers"})
        self.assertEqual(dom.one("canvas", data_heatmap="layers")["data-cells"], "12")
        self.assertEqual(dom.one("canvas", data_heatmap="time")["data-cells"], "40")

    def test_controls(self):
        self.report(self.run_directory)
        page = self.run_directory / "report.html"
        for axis in ("tokens", "seconds"):
            dom = self.drawn(page, f"""document.querySelector('[data-axis={axis}]').click();
                document.querySelector('[data-log=loss]').click(); document.querySelector('[data-toggle=checkpoint]').click();""")
            self.assertEqual(dom.one("body")["data-axis"], axis)
            self.assertEqual(self.points(dom, "train/loss", "raw"), (99, 2))
            self.assertEqual(dom.one("figure", data_panel="loss")["data-marks"], "2")

    def test_tooltip_tells_step_and_value(self):
        self.report(self.run_directory)
        dom = self.drawn(self.run_directory / "report.html", """
            const svg = document.querySelector('figure[data-panel=loss] svg'), box = svg.getBoundingClientRect();
            svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 13, clientY: box.top + 50}));""")
        shown = " ".join(e["text"] for e in dom.elements[dom.elements.index(dom.one("div", id="tooltip")):])
        self.assertIn("step 100 · 51.2K tokens", shown)
        self.assertIn("1.05", shown)  # 5 / 100 + 1

    def test_long_runs_are_thinned(self):
        directory = self.make_run("long", [{"step": step, "train/loss": 1 + 1 / step} for step in range(1, 30001)])
        self.report(directory)
        page = directory / "report.html"
        dom = self.drawn(page)
        self.assertLess(page.stat().st_size, 200_000)
        self.assertLessEqual(self.points(dom, "train/loss", "raw")[0], 2000)
        self.assertGreater(self.points(dom, "train/loss", "raw")[0], 900)
        self.assertRegex("".join(e["text"] for e in dom.all("figcaption")), r"\d+ of 30000 points drawn")

    def test_text_of_a_run_stays_text(self):
        evil = "</script><script>document.body.id='taken'</script><img src=x onerror=\"document.body.id='taken'\">"
        directory = self.make_run("run & <b>", known_lines(3) + [{"step": 2, "event": evil, "error": evil}])
        (directory / "config.yaml").write_text(f"sample_prompt: {evil}\n")
        self.report(directory)
        dom = self.drawn(directory / "report.html")
        self.assertNotIn("id", dom.one("body"))
        self.assertEqual(dom.all("img"), [])
        self.assertEqual(dom.one("h1")["text"], "run & <b>")
        self.assertIn(evil, dom.one("pre", **{"class": "config"})["text"])

    def test_nothing_comes_from_the_network(self):
        self.report(self.run_directory)
        page = (self.run_directory / "report.html").read_text()
        self.assertEqual(set(re.findall(r"https?://[^\s\"'`]+", page)), {"http://www.w3.org/2000/svg"})
        self.assertIn("default-src 'none'", page)
        self.assertNotRegex(page, r"<script[^>]+src|<link[^>]+stylesheet|@import|url\(")

    def test_comparison(self):
        second = self.make_run("second", known_lines(60))
        third = self.make_run("third", known_lines(30))
        for directory, steps in ((self.run_directory, 100), (second, 60)):
            (directory / "config.yaml").write_text(CONFIG.replace("TEXT", "data.txt").replace("steps: 12", f"steps: {steps}"))
        self.report("--compare", self.run_directory, second, third)
        dom = self.drawn(self.run_directory / "comparison.html")
        for name, count in (("run", 99), ("second", 59), ("third", 30)):
            self.assertEqual(self.points(dom, f"{name}: train/loss", "mean")[0], count)
        cells = [e["text"] for e in dom.all("td")]
        row = cells.index("training.steps")
        self.assertEqual(cells[row:row + 4], ["training.steps", "100", "60", "–"])

    def test_a_trained_run(self):
        text, config, directory = (self.directory / name for name in ("text.txt", "config.yaml", "trained"))
        text.write_text("".join(f"line {i} of a text that says little, again and again\n" for i in range(300)))
        config.write_text(CONFIG.replace("TEXT", str(text)))
        trained = run(DSV3, "train", config, "--out", directory)
        self.assertEqual(trained.returncode, 0, trained.stderr)
        self.report(directory)
        dom = self.drawn(directory / "report.html")
        self.assertEqual(self.points(dom, "train/loss", "raw"), (12, 1))
        self.assertEqual(self.points(dom, "eval/loss", "dots"), (3, 1))
        self.assertEqual(self.points(dom, "moe/bias_spread", "line"), (12, 1))
        self.assertEqual(dom.one("canvas", data_heatmap="layers")["data-cells"], str(2 * 4))
        saved = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        marks = [e["data-mark"] for e in dom.all("line") if "data-mark" in e]
        panels = len([e for e in dom.all("figure") if "data-panel" in e])
        self.assertEqual(marks.count("checkpoint"), panels * sum(line.get("event") == "checkpoint" for line in saved))
        self.assertIn(f"dsv3 train {directory}", [e["text"] for e in dom.all("pre")])


class CommandLine(Runs):
    """Cases that need no browser."""

    def assert_error(self, code, pattern, *arguments):
        result = run(DSV3, "report", *arguments)
        self.assertEqual(result.returncode, code, result.stderr)
        self.assertRegex(result.stderr, r"\Adsv3: error: [^\n]+\n\Z")
        self.assertRegex(result.stderr, pattern)

    def test_errors_name_what_is_wrong(self):
        empty = self.directory / "empty"
        empty.mkdir()
        self.assert_error(1, "nowhere is not a directory", self.directory / "nowhere")
        self.assert_error(1, "empty is not a run.*metrics.jsonl", empty)
        self.assert_error(2, "--compare", self.run_directory, empty)
        self.assert_error(2, "--compare needs two", "--compare", self.run_directory)
        self.assert_error(1, "none/x.html", self.run_directory, "--out", self.directory / "none" / "x.html")
        (empty / "metrics.jsonl").write_text("no line\n")
        self.assert_error(1, "holds no line that can be read: line 1", empty)

    def test_broken_lines_are_named_and_left_out(self):
        directory = self.make_run("broken", known_lines(5) + [[1, 2]], end='{"step": 6, "train/lo')
        result = self.report(directory, "--out", self.directory / "page.html")
        self.assertIn("line 6 is not a JSON object", result.stderr)
        self.assertIn("last line is cut off", result.stderr)
        self.assertIn("page.html", result.stdout)
        self.assertFalse((directory / "report.html").exists())


if __name__ == "__main__":
    DSV3, words = suite.arguments()
    suite.main(words)
