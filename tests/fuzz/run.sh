#!/usr/bin/env bash
# Fuzzes the readers for a while, one after the other: libFuzzer under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   tests/fuzz/run.sh [--keep] SECONDS [READER…]     readers: safetensors manifest shard megatron yaml json text
#
# Needs clang with libclang-rt (scripts/setup.sh --tests). Prints a line a reader: runs, coverage, inputs found. With
# --keep, inputs that reach something new are put into the corpus of the tree, as few and as short as cover the same.
# Exit code 1 when a reader failed; its input then stands in build/fuzz/tests/fuzz.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"
cd "$root"
keep=false
case "${1:-}" in
  -h | --help) usage && exit 0 ;;
  --keep) keep=true && shift ;;
esac
[[ "${1:-}" =~ ^[0-9]+$ ]] || die "say for how many seconds (see --help)"
seconds=$1 && shift
readers=("$@")
[ $# -gt 0 ] || readers=(safetensors manifest shard megatron yaml json text)

cmake --preset fuzz >/dev/null
ninja -C build/fuzz --quiet fuzzers
place=build/fuzz/tests/fuzz failed=0
for reader in "${readers[@]}"; do
  program=$(find build/fuzz -type f -name "fuzz_$reader" -perm -u+x | head -1)
  [ -n "$program" ] || die "no reader called '$reader'"
  log=$place/$reader.log
  if "$program" -max_total_time="$seconds" -max_len=16384 -timeout=10 -malloc_limit_mb=64 -print_final_stats=1 \
    -artifact_prefix=$place/ "$place/found_$reader" "tests/fuzz/corpus/$reader" >"$log" 2>&1; then
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    say "$reader: $runs runs in $seconds s, coverage $(grep -o 'cov: [0-9]*' "$log" | tail -1 | cut -d' ' -f2), no failure"
  else
    failed=1
    say "$reader: FAILED, see $log"
    grep -m3 -E 'ERROR|broken promise|runtime error' "$log" || true
  fi
  if $keep; then
    smallest=$(mktemp -d)
    "$program" -merge=1 -max_len=4096 "$smallest" "tests/fuzz/corpus/$reader" "$place/found_$reader" >/dev/null 2>&1
    find "$smallest" -type f -size -4k -print0 | xargs -0 ls -S -r | sed 41,\$d | xargs -r cp -t "tests/fuzz/corpus/$reader"
    rm -rf "$smallest"
  fi
done
exit $failed
