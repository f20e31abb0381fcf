"""What the scripts beside it share: the program's path from the command line, and the last line with the totals."""
import argparse
import sys
import unittest
from pathlib import Path


def arguments():
    """Returns the path behind --dsv3, and the words that are unittest's own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dsv3", required=True)
    given, rest = parser.parse_known_args()
    return str(Path(given.dsv3).resolve()), rest


def main(words):
    """Runs the tests of the calling script and ends with `N passed, N failed, N skipped`; exit code 1 if any failed."""
    result = unittest.main(argv=[sys.argv[0], *words], exit=False).result
    failed = len(result.failures) + len(result.errors)
    skipped = len(result.skipped)
    print(f"{max(0, result.testsRun - failed - skipped)} passed, {failed} failed, {skipped} skipped", flush=True)
    sys.exit(1 if failed else 0)
