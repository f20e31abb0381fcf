#!/usr/bin/env bash
# Builds and runs all tests: the C++ cases and the comparisons with transformers. The last line is the total,
# "N passed, N failed, N skipped"; the exit code is 0 only when nothing failed.
#
#   scripts/test.sh                 everything
#   scripts/test.sh -R 'ops|mla'    only the CTest tests whose name matches (any options of ctest)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"
case "${1:-}" in -h | --help) usage && exit 0 ;; esac

scripts/setup.sh --tests
scripts/build_kernels.sh
[ -s data/kjv.txt ] || scripts/fetch_text.sh

results=$root/build/release/test_results
rm -rf "$results"
mkdir -p "$results"
# Each GoogleTest binary writes its cases to $results/NAME.xml, CTest the tests to ctest.xml.
say "Running the tests"
GTEST_OUTPUT="xml:$results/" OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} \
  ctest --test-dir build/release --output-on-failure --output-junit "$results/ctest.xml" \
  --test-output-size-passed 200000 --test-output-size-failed 200000 "$@" </dev/null || true
[ -e "$results/ctest.xml" ] || die "ctest wrote no results (see above)"
exec python3 tools/count_tests.py "$results/ctest.xml" "$results"
