#!/usr/bin/env python3
"""Adds up one test run and prints `N passed, N failed, N skipped` as its last line.

Usage: tools/count_tests.py CTEST_JUNIT_XML GTEST_XML_DIR

Each GoogleTest case counts (the binaries write one XML file each, named after themselves); a CTest test
without such a file counts by the totals line that it prints itself, or else as one test. Names what failed
and why something was skipped. Exit code 1 when a test failed or none ran.
"""
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

TOTALS = re.compile(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", re.MULTILINE)


def gtest_cases(path):
    """Yields (case name, outcome, reason) of one GoogleTest XML file."""
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        if case.find("failure") is not None:
            yield name, "failed", (case.find("failure").get("message") or "").strip()
        elif case.get("status") == "notrun" or case.get("result") in ("skipped", "suppressed"):
            skip = case.find("skipped")
            reason = skip.get("message") or skip.text or "" if skip is not None else "disabled"
            yield name, "skipped", reason.strip()
        else:
            yield name, "passed", ""


def ctest_cases(test, gtest_dir):
    """Yields (name, outcome, reason) of one <testcase> of CTest's JUnit file."""
    name, status = test.get("name"), test.get("status")
    output = test.findtext("system-out") or ""
    report = gtest_dir / f"{name}.xml"
    if report.exists():
        try:
            cases = list(gtest_cases(report))
        except ElementTree.ParseError:
            cases = []
        yield from ((f"{name}: {case}", outcome, reason) for case, outcome, reason in cases)
        if status == "fail" and not any(outcome == "failed" for _, outcome, _ in cases):
            yield name, "failed", "the binary failed outside of its cases: " + output.strip()[-300:]
    elif totals := TOTALS.findall(output):
        counts = dict(zip(("passed", "failed", "skipped"), map(int, totals[-1])))
        if status == "fail" and not counts["failed"]:
            counts["failed"] = 1
        for outcome, count in counts.items():
            yield from ((name, outcome, "see its output") for _ in range(count))
    elif status == "run":
        yield name, "passed", ""
    elif status == "fail":
        yield name, "failed", output.strip()[-1000:] or "no output"
    else:
        # CTest also calls "not run" what it could not start: a binary that was not built is a failure.
        skip = test.find("skipped")
        message = skip.get("message") or "" if skip is not None else ""
        asked_for = status == "disabled" or message.startswith("SKIP_")
        lines = output.strip().splitlines()
        yield name, "skipped" if asked_for else "failed", lines[-1] if lines and asked_for else message


def main():
    junit, gtest_dir = Path(sys.argv[1]), Path(sys.argv[2])
    totals, skipped = Counter(), Counter()
    for test in ElementTree.parse(junit).iter("testcase"):
        for name, outcome, reason in ctest_cases(test, gtest_dir):
            totals[outcome] += 1
            if outcome == "failed":
                print(f"FAILED {name}\n  " + reason.replace("\n", "\n  "))
            elif outcome == "skipped":
                skipped[reason.splitlines()[-1] if reason else "no reason given"] += 1
    for reason, count in skipped.items():
        print(f"skipped {count}: {reason}")
    print(f"{totals['passed']} passed, {totals['failed']} failed, {totals['skipped']} skipped", flush=True)
    return 0 if totals["passed"] and not totals["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
