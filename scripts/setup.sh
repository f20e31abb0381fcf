#!/usr/bin/env bash
# Installs what dsv3 needs: Debian packages, and LibTorch from the official torch wheel.
#
#   scripts/setup.sh            what building and training need
#   scripts/setup.sh --tests    also what the tests compare with (Python's torch and transformers, readers of metrics)
#
# Without nvcc or a GPU it takes the wheel alone and the two libraries that a CPU program loads (0.6 GB to
# fetch, 1.3 GB on disk); with one of them, or with --tests, the wheel's other dependencies too (about 3 GB to
# fetch, 6 GB on disk). Everything goes into third_party/; scripts/versions.txt holds the versions.
# LIBTORCH=/path/to/torch uses an installed LibTorch (a directory with include/ and lib/) instead.
# Runs as root or with sudo; run again, it does only what is missing.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

with_tests=false
for argument in "$@"; do
  case "$argument" in
    --tests) with_tests=true ;;
    -h | --help) usage && exit 0 ;;
    *) die "unknown argument '$argument' (there is --tests)" ;;
  esac
done

packages=(
  g++ make cmake ninja-build ccache git ca-certificates                         # build
  libyaml-cpp-dev nlohmann-json3-dev libcli11-dev libfmt-dev libspdlog-dev      # config, command line, messages
  zlib1g-dev libzstd-dev libxxhash-dev                                          # data
  libprotobuf-dev protobuf-compiler                                             # TensorBoard's event files
  python3 python3-venv                                                          # fetches the torch wheel
  bible-kjv                                                                     # the first text to train on
)
test_packages=(
  libgtest-dev libbenchmark-dev clang-format-14 clang libclang-rt-14-dev        # tests, formatting, fuzzing
  chromium                                                                      # opens the report's pages
)

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

install_packages() {
  local package status
  missing=()
  command -v dpkg-query >/dev/null || die "this set-up is for Debian and Ubuntu: dpkg was not found (docs/INSTALLATION.md lists the packages)"
  status=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null || true)
  for package in "$@"; do
    grep -q "^$package installed$" <<<"$status" || missing+=("$package")
  done
  if [ ${#missing[@]} = 0 ]; then return; fi
  [ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
    die "installing system packages needs root or sudo: run this as root once (apt-get install ${missing[*]})"
  say "Installing ${#missing[@]} system packages: ${missing[*]}"
  local log
  log=$(mktemp)
  as_root apt-get update -q >"$log" 2>&1 || { tail -5 "$log" >&2; die "apt-get update failed (see above)"; }
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" \
    >"$log" 2>&1 </dev/null || { tail -5 "$log" >&2; die "apt-get could not install ${missing[*]} (see above)"; }
  rm -f "$log"
}

# Which of the wheel's parts this machine needs: minimal, or full.
choose_parts() {
  if $with_tests; then
    parts=full why="the tests run Python's torch"
  elif find_nvcc >/dev/null; then
    parts=full why="nvcc is here: CUDA builds load libtorch_cuda"
  elif have_gpu; then
    parts=full why="a GPU is here: CUDA builds load libtorch_cuda"
  else
    parts=minimal why="no nvcc, no GPU: the CPU libraries are enough"
  fi
}

need_space() {
  local free
  free=$(df -Pm third_party | awk 'NR == 2 {print $4}')
  [ "$free" -ge "$1" ] || die "third_party/ needs $1 MB of free disk space, there are $free"
}

pip_install() {
  third_party/python/bin/pip install --quiet --disable-pip-version-check --no-input --progress-bar off \
    --constraint scripts/versions.txt "$@" ||
    die "pip could not install: $* (see above; with a LibTorch already on disk, set LIBTORCH=/path/to/torch)"
}

pinned() { grep -E "^$1==" scripts/versions.txt; }

# Fills third_party/python; .parts in it says what it holds, so that a second run has nothing to do.
install_python() {
  local stamp=third_party/python/.parts pins have=""
  pins=$(cksum <scripts/versions.txt)
  [ -e $stamp ] && have=$(cat $stamp)
  case "$have" in
    "$pins tests") return ;;
    "$pins full") $with_tests || return 0 ;;
    "$pins minimal") [ "$parts" = full ] || return 0 ;;
    *) rm -rf third_party/python ;;
  esac
  mkdir -p third_party
  if [ ! -x third_party/python/bin/pip ]; then
    [ "$parts" = full ] && need_space 8000 || need_space 2500
    python3 -m venv third_party/python || die "python3 could not make a virtual environment in third_party/python"
  fi
  say "Installing LibTorch, $(pinned torch), into third_party/python ($why)"
  if [ "$parts" = minimal ]; then
    pip_install --no-deps "$(pinned torch)" "$(pinned nvidia-cuda-runtime)" "$(pinned nvidia-cuda-cupti)"
  else
    pip_install "$(pinned torch)"
  fi
  if $with_tests; then
    say "Installing what the tests compare with: $(pinned transformers), $(pinned safetensors), $(pinned numpy)"
    pip_install transformers safetensors numpy
    say "Installing the readers of metrics: $(pinned tensorboard), $(pinned wandb), $(pinned prometheus_client)"
    pip_install tensorboard wandb prometheus_client
    parts=tests
  fi
  echo "$pins $parts" >$stamp
}

# Whether third_party/libtorch is the link that an earlier LIBTORCH=… left: it stays until another one is given.
remembered() {
  local target
  target=$(readlink third_party/libtorch 2>/dev/null) || return 1
  [ -z "${LIBTORCH:-}" ] && [[ $target = /* ]] && [ -e "$target/lib/libtorch_cpu.so" ]
}

# third_party/libtorch is what CMake finds.
link_libtorch() {
  local target
  if remembered; then return; fi
  if [ -n "${LIBTORCH:-}" ]; then
    [ -f "$LIBTORCH/include/ATen/core/Tensor.h" ] && [ -e "$LIBTORCH/lib/libtorch_cpu.so" ] ||
      die "LIBTORCH=$LIBTORCH holds no include/ATen/core/Tensor.h and lib/libtorch_cpu.so"
    target=$(cd "$LIBTORCH" && pwd)
  else
    target=$(cd third_party && echo python/lib/python3*/site-packages/torch)
    [ -e "third_party/$target/lib/libtorch_cpu.so" ] ||
      die "third_party/python holds no LibTorch: remove third_party/ and run this again"
  fi
  mkdir -p third_party
  [ "$(readlink third_party/libtorch 2>/dev/null)" = "$target" ] || ln -sfn "$target" third_party/libtorch
}

if $with_tests; then packages+=("${test_packages[@]}"); fi
install_packages "${packages[@]}"
choose_parts
if { [ -z "${LIBTORCH:-}" ] && ! remembered; } || $with_tests; then install_python; fi
link_libtorch
say "Set-up complete: LibTorch in $(readlink -f third_party/libtorch)"
