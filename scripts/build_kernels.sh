#!/usr/bin/env bash
# Builds dsv3 into build/release, with the CUDA kernels where nvcc is and for the CPU only otherwise.
#
#   scripts/build_kernels.sh                 everything, tests included
#   scripts/build_kernels.sh dsv3            only the program (or any other targets)
#   scripts/build_kernels.sh --cpu | --cuda  choose, whatever this machine has
#
# Only what changed is built again. Runs scripts/setup.sh first when LibTorch is missing.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

mode=auto targets=()
for argument in "$@"; do
  case "$argument" in
    --cpu | --cuda) mode=${argument#--} ;;
    -h | --help) usage && exit 0 ;;
    -*) die "unknown option '$argument' (there are --cpu and --cuda)" ;;
    *) targets+=("$argument") ;;
  esac
done

[ -e third_party/libtorch/lib/libtorch_cpu.so ] || scripts/setup.sh

# LibTorch's CUDA libraries are those of CUDA 13: an older compiler's run time does not go with them.
cuda_compiler() {
  nvcc=$(find_nvcc) || { reason="no nvcc here, neither on the PATH nor in /usr/local/cuda/bin"; return 1; }
  local major
  major=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
  [ "${major:-0}" -ge 13 ] || { reason="$nvcc is of CUDA ${major:-?}, CUDA 13 is needed"; return 1; }
}

options=() nvcc="" reason=""
if [ "$mode" = cpu ]; then
  preset=release why="as asked"
elif cuda_compiler; then
  [ "$mode" = cuda ] && why="as asked" || why="found $nvcc"
  preset=cuda options=(-DCMAKE_CUDA_COMPILER="$nvcc")
elif [ "$mode" = cuda ]; then
  die "no CUDA build: $reason"
else
  preset=release why=$reason
fi
have_tests=OFF
for config in /usr/lib/*/cmake/GTest /usr/lib/cmake/GTest; do
  if [ -e "$config/GTestConfig.cmake" ]; then have_tests=ON; fi
done
options+=(-DDSV3_TESTS=$have_tests)

[ "$preset" = cuda ] && kind="with CUDA" || kind="for the CPU only"
say "Building build/release $kind ($why)"

# The options of the last configuration: an unchanged tree is then left to ninja alone.
signature="$preset ${options[*]} $(readlink -f third_party/libtorch)"
log=build/release/configure.log
if [ ! -e build/release/build.ninja ] || [ "$(cat build/release/.configured 2>/dev/null)" != "$signature" ]; then
  mkdir -p build/release
  # A change of LibTorch or compiler leaves nothing in the cache worth keeping.
  rm -f build/release/CMakeCache.txt
  cmake --preset "$preset" "${options[@]}" >$log 2>&1 || { tail -20 $log >&2; die "cmake failed (see above, and $log)"; }
  echo "$signature" >build/release/.configured
fi
ninja -C build/release --quiet "${targets[@]}" || die "the build failed (see above)"
