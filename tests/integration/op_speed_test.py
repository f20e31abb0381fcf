"""bench/op_speed.py and op_compiled.py on the CPU: every operator has its compiled form, and one run gives all three ways.

Usage: op_speed_test.py --dsv3 PATH. Ends with `N passed, N failed, N skipped`. Needs torch.
"""
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import suite

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
DSV3 = ""


class OpSpeed(unittest.TestCase):
    def test_every_operator_has_a_compiled_form_that_runs(self):
        import op_compiled
        op_compiled.prepare("cpu", 1)
        plans = op_compiled.plans(DSV3, ["--shape", "small", "--tokens", "8", "--device", "cpu"])
        self.assertGreater(len(plans), 20)
        for plan in plans:
            with self.subTest(plan["op"]):
                self.assertIn(plan["op"], op_compiled.CASES)
                make = op_compiled.Inputs("cpu", op_compiled.DTYPES[plan["dtype"]])
                case = op_compiled.CASES[plan["op"]](plan["dims"], make)
                op_compiled.runner(case, lambda function: function)()  # plain: compiling all takes minutes

    def test_one_run_gives_three_ways_and_a_table(self):
        with tempfile.TemporaryDirectory() as directory:
            rows = Path(directory) / "rows.jsonl"
            done = subprocess.run([sys.executable, "-W", "ignore", ROOT / "bench" / "op_speed.py", "rms_norm_forward", "--shape", "small",
                                   "--tokens", "3", "--device", "cpu", "--rounds", "2", "--turns", "1", "--json", rows,
                                   "--program", DSV3], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            lines = [json.loads(line) for line in rows.read_text().splitlines()]
        self.assertEqual([line["way"] for line in lines], ["ours", "composed", "compiled"])
        for line in lines:
            self.assertEqual((line["op"], line["shape"], line["tokens"]), ("rms_norm_forward", "small", 3))
            self.assertTrue(0 < line["min_us"] <= line["median_us"])
        self.assertRegex(done.stdout, r"(?m)^rms_norm_forward +small +[0-9.]+ +[0-9.]+ +[0-9.]+ ")

    def test_a_wrong_name_is_the_programs_error(self):
        done = subprocess.run([sys.executable, "-W", "ignore", ROOT / "bench" / "op_compiled.py", "rms_norm_foward", "--program", DSV3],
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn("did you mean 'rms_norm_forward'?", done.stderr)

    def test_a_missing_program_is_named(self):
        done = subprocess.run([sys.executable, "-W", "ignore", ROOT / "bench" / "op_speed.py", "--program", "/nowhere/dsv3"],
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn("/nowhere/dsv3: No such file or directory (build it", done.stderr)


if __name__ == "__main__":
    DSV3, words = suite.arguments()
    suite.main(words)
