#!/usr/bin/env bash
#   bench/gpu_session.sh OUT [--parts LIST] [--bin DIR] [--shape v3|lite12|small|all] [--seconds N]
#   bench/gpu_session.sh --pack FILE.tar.gz
#
# Checks and times everything on a machine with a GPU in one go; builds nothing. Writes logs and JSON lines into the
# directory OUT and ends with a summary. LIST holds, in this order and separated by commas (default: all of them):
#   verify      dsv3 verify: what the machine has, every operator against its reference            verify.log
#   tests       the cases of the unit tests that run on a GPU                                       tests.log
#   bench       dsv3 bench op: ours beside LibTorch's own way                       bench_op.jsonl, bench_op.log
#   speed       bench/op_speed.py: torch.compile's forms in turn with both          op_speed.jsonl, op_speed.log
#   memcheck    compute-sanitizer over our kernels in short tests                               sanitizer.log
#   racecheck   the same for races in shared memory                                             sanitizer.log
# Each part has its own time limit, and all together --seconds (default: 3600); a part that fails or runs out of time
# does not stop the rest. Exit code 0: every part passed.
#
# --bin names the directory of the programs (default: build/release/bin). --pack copies the programs, and the shared
# libraries beside LibTorch that they need, as bin/ and lib/ for a machine that has Python with torch but no build:
# unpack it there and give --bin DIR/bin.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"
here=$PWD
cd "$root"
export PATH="$PATH:/usr/local/cuda/bin"

tests=(ops_test optim_test mla_test moe_test training_test)
# Short cases with a GPU. Attention is LibTorch's own there; normal_fill has neither shared memory nor neighbours.
sanitized='*cuda*:-*Attention*:*Normal*'
# racecheck ends programs that launch clusters of thread blocks: cross-entropy, and cuBLAS in the gate and in products.
unraced=':*CrossEntropy*:*Gate*:*Linear*'

# A path as the caller meant it, made absolute.
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }

pack() {
  local dir
  dir=$(mktemp -d)
  mkdir -p "$dir/bin" "$dir/lib"
  for program in dsv3 "${tests[@]}"; do
    [ -x "build/release/bin/$program" ] || die "build/release/bin/$program is missing (scripts/build_kernels.sh)"
    strip -o "$dir/bin/$program" "build/release/bin/$program"
    # Not LibTorch's, and not what every Linux has.
    ldd "build/release/bin/$program" | awk '$3 ~ /^\// && $3 !~ /\/(torch|nvidia)\// {print $3}' |
      grep -Ev '/(ld-linux|lib(c|m|dl|rt|util|pthread|gcc_s|z|zstd|stdc\+\+))[.-]' | xargs -r cp -uL -t "$dir/lib"
  done
  tar -C "$dir" -czf "$1" bin lib || die "cannot write $1"
  rm -rf "$dir"
  say "$1: $(du -h "$1" | cut -f1)"
}

out="" parts=verify,tests,bench,speed,memcheck,racecheck programs=$root/build/release/bin shape=all budget=3600
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --pack) [ $# -eq 2 ] || die "--pack takes one file" && pack "$(absolute "$2")" && exit 0 ;;
    --parts | --bin | --shape | --seconds)
      [ $# -ge 2 ] || die "$1 needs a value"
      case "$1" in --parts) parts=$2 ;; --bin) programs=$(absolute "$2") ;; --shape) shape=$2 ;; --seconds) budget=$2 ;; esac
      shift 2
      ;;
    -*) die "unknown argument '$1' (see --help)" ;;
    *) [ -z "$out" ] || die "one directory, not two: '$out', '$1'" && out=$(absolute "$1") && shift ;;
  esac
done
[ -n "$out" ] || die "name a directory for logs and results (see --help)"
[ -x "$programs/dsv3" ] || die "$programs/dsv3 is missing (scripts/build_kernels.sh, or --bin DIR)"
for part in ${parts//,/ }; do
  case "$part" in
    verify | tests | bench | speed | memcheck | racecheck) ;;
    *) die "no part called '$part' (verify, tests, bench, speed, memcheck, racecheck)" ;;
  esac
done
have_gpu || die "no GPU is seen here"
mkdir -p "$out"
: >"$out/summary.txt"

# The programs look for LibTorch where they were built; elsewhere it is in Python's torch.
python=python3
[ ! -x third_party/python/bin/python ] || python=third_party/python/bin/python
if ldd "$programs/dsv3" | grep -q 'not found'; then
  torch=$("$python" -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "lib"))') ||
    die "$programs/dsv3 finds no LibTorch here, and $python has no torch"
  export LD_LIBRARY_PATH="$programs/../lib:$torch${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi

failed=0
note() { say "$*" | tee -a "$out/summary.txt"; }

# run PART LIMIT LOG COMMAND…: appends the command's output to LOG, within LIMIT seconds and what is left of all.
run() {
  local part=$1 limit=$2 log=$out/$3 start=$SECONDS code
  shift 3
  case ",$parts," in *",$part,"*) ;; *) return 0 ;; esac
  [ "$limit" -le $((budget - SECONDS)) ] || limit=$((budget - SECONDS))
  if [ "$limit" -lt 5 ]; then
    note "$(printf '%-10s not run: no time left' "$part")"
    failed=1
    return 0
  fi
  printf '== %s\n' "$*" >>"$log"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
  code=$?
  case $code in
    0) note "$(printf '%-10s ok, %d s' "$part" $((SECONDS - start)))" ;;
    124 | 137) note "$(printf '%-10s stopped after %d s: see %s' "$part" "$limit" "$log")" ;;
    *) note "$(printf '%-10s FAILED with exit code %d after %d s: see %s' "$part" "$code" $((SECONDS - start)) "$log")" ;;
  esac
  [ "$code" = 0 ] || failed=1
}

run_tests() {
  local code=0 program
  for program in "${tests[@]}"; do
    [ -x "$programs/$program" ] || continue
    echo "== $program"
    "$programs/$program" --gtest_brief=1 --gtest_filter='*cuda*' || code=1
  done
  return $code
}

run_bench() { "$programs/dsv3" bench op --device cuda --shape "$shape" --table >>"$out/bench_op.jsonl"; }

# sanitize TOOL [WITHOUT]: WITHOUT is added to the cases left out.
sanitize() {
  local filter=()
  ! compute-sanitizer --help | grep -q -- --kernel-name || filter=(--kernel-name kns=dsv3)
  compute-sanitizer --tool "$1" "${filter[@]}" --error-exitcode 9 "$programs/ops_test" --gtest_brief=1 \
    --gtest_filter="$sanitized${2-}"
}
export -f run_tests run_bench sanitize
export programs out shape sanitized unraced
export tests_list="${tests[*]}"

note "$(date -u +%FT%TZ) $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)"
run verify 120 verify.log "$programs/dsv3" verify
run tests 300 tests.log bash -c 'read -ra tests <<<"$tests_list"; run_tests'
run bench 300 bench_op.log bash -c run_bench
run speed 900 op_speed.log "$python" bench/op_speed.py --device cuda --shape "$shape" --program "$programs/dsv3" \
  --json "$out/op_speed.jsonl"
run memcheck 400 sanitizer.log bash -c 'sanitize memcheck'
run racecheck 400 sanitizer.log bash -c 'sanitize racecheck "$unraced"'

{
  grep -hE '^\[  (FAILED|PASSED)  \]' "$out/tests.log"
  grep -h 'SUMMARY:' "$out/sanitizer.log"
  for log in op_speed bench_op; do
    grep -q '^operator ' "$out/$log.log" && sed -n '/^operator /,$p' "$out/$log.log" && break
  done
} 2>/dev/null | tee -a "$out/summary.txt"
exit $failed
