#!/usr/bin/env python3
"""Feeds a run's metrics.jsonl to Weights & Biases through its official client (pip install wandb).

  scripts/wandb_bridge.py RUN             sends what the run has logged, and ends
  scripts/wandb_bridge.py RUN --follow    goes on with new lines until Ctrl-C
  WANDB_MODE=offline scripts/wandb_bridge.py RUN     writes RUN/wandb/offline-run-*, for `wandb sync` later

`monitor.wandb: true` makes `dsv3 train` start it with --with-trainer: it then follows until the trainer is gone.
Called again, it goes on behind the last line that it sent, in the same W&B run. The client's own settings
(WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, …) apply; the project is "dsv3" unless they say otherwise.

Ordinary lines become points over the x axis "step". moe/expert_distribution becomes a histogram over the experts'
ids for each layer, and one for all layers. Event lines become events/NAME = how many of them there have been.
"""
import argparse
import json
import os
import sys
import threading
import time
import uuid
from pathlib import Path

POLL_SECONDS = 1.0
DISTRIBUTION = "moe/expert_distribution"
LAYER_MARK = "moe/max_vio/layer_"


def parsed(text):
    """The line's object; None for a line that is none, as a full disk may leave it."""
    try:
        line = json.loads(text)
        return line if isinstance(line["time"], (int, float)) and isinstance(line["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def is_replaced(file, path):
    """Whether another file has this path now: a run that goes on drops lines by writing a new file."""
    try:
        return os.fstat(file.fileno()).st_ino != os.stat(path).st_ino
    except FileNotFoundError:
        return False


def lines_of(path, is_over, state):
    """Yields the lines that were not sent yet; at the end of the file waits for more until is_over()."""
    while True:
        with open(path, encoding="utf-8", errors="replace") as file:
            already = state.num_sent(file)
            file.seek(0)
            part, number = "", 0
            while True:
                over = is_over()  # asked before reading: what was written before the end is still read
                replaced = is_replaced(file, path)
                text = file.readline()
                if text:
                    part += text
                    if part.endswith("\n"):
                        line, part, number = parsed(part), "", number + 1
                        if number > already and line:
                            yield line
                elif replaced:
                    break
                elif over:
                    return
                else:
                    time.sleep(POLL_SECONDS)


class State:
    """What has been sent: the W&B run's id, the time of the last line, how many lines in a row had that time."""

    def __init__(self, path):
        self.path = path
        self.values = {"id": uuid.uuid4().hex[:12], "time": 0.0, "lines": 0, "events": {}}
        if path.exists():
            self.values.update(json.loads(path.read_text(encoding="utf-8")))

    def num_sent(self, file):
        """How many of the file's lines were sent: up to the last one sent where it is still there, whatever the clock
        did before and after; else those that are not younger."""
        marked = older = same = 0
        for number, text in enumerate(file, 1):
            line = parsed(text)
            if not line:
                continue
            same = same + 1 if line["time"] == self.values["time"] else 0
            if same and same <= self.values["lines"]:
                marked = number
            if line["time"] <= self.values["time"]:
                older = number
        return marked or older

    def sent(self, line):
        same = line["time"] == self.values["time"]
        self.values["lines"] = self.values["lines"] + 1 if same else 1
        self.values["time"] = line["time"]

    def save(self):
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values), encoding="utf-8")
        temporary.replace(self.path)


def histogram(wandb, counts):
    return wandb.Histogram(np_histogram=(counts, [i - 0.5 for i in range(len(counts) + 1)]))


def point_of(wandb, line, state):
    """The line as the client takes it."""
    if "event" in line:
        events = state.values["events"]
        events[line["event"]] = events.get(line["event"], 0) + 1
        return {"step": line["step"], f"events/{line['event']}": events[line["event"]]}
    point = {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "time"}
    if DISTRIBUTION in line:
        rows = line[DISTRIBUTION]
        layers = [name[len(LAYER_MARK):] for name in line if name.startswith(LAYER_MARK)]
        for layer, counts in zip(layers, rows):
            point[f"{DISTRIBUTION}/layer_{layer}"] = histogram(wandb, counts)
        point[DISTRIBUTION] = histogram(wandb, [sum(column) for column in zip(*rows)])
    return point


def end_of_input():
    """A function that says whether standard input has ended: the trainer holds its other end."""
    over = threading.Event()

    def wait():
        while sys.stdin.buffer.read(4096):
            pass
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    return over.is_set


def config_of(run):
    path = run / "config.yaml"
    if not path.exists():
        return {}
    import yaml  # comes with wandb

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's directory")
    ending = parser.add_mutually_exclusive_group()
    ending.add_argument("--follow", action="store_true", help="wait for new lines until Ctrl-C")
    ending.add_argument("--with-trainer", action="store_true", help="wait for new lines until standard input ends")
    arguments = parser.parse_args()
    metrics = arguments.run / "metrics.jsonl"
    if not metrics.exists():
        sys.exit(f"wandb_bridge.py: error: {metrics} is not there: is {arguments.run} a run's directory?")
    is_over = end_of_input() if arguments.with_trainer else (lambda: not arguments.follow)
    try:
        import wandb
    except ImportError as error:
        sys.exit(f"wandb_bridge.py: error: {error} (pip install wandb)")

    (arguments.run / "wandb").mkdir(exist_ok=True)
    state = State(arguments.run / "wandb" / "bridge.json")
    run = wandb.init(project=os.environ.get("WANDB_PROJECT", "dsv3"), id=state.values["id"], resume="allow",
                     name=arguments.run.resolve().name, dir=str(arguments.run), config=config_of(arguments.run),
                     settings=wandb.Settings(console="off"))
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    try:
        for line in lines_of(metrics, is_over, state):
            run.log(point_of(wandb, line, state))
            state.sent(line)
    except KeyboardInterrupt:
        pass
    run.finish()
    state.save()


if __name__ == "__main__":
    main()
