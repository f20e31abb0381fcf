# Shared by the scripts beside it (source it; it runs nothing): messages, and what this machine has.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*"; }

# One sentence on stderr and exit 1.
die() {
  printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# Prints the CUDA compiler's path; fails when there is none.
find_nvcc() {
  if [ -n "${CUDACXX:-}" ] && [ -x "$CUDACXX" ]; then
    echo "$CUDACXX"
  elif command -v nvcc; then
    :
  elif [ -x /usr/local/cuda/bin/nvcc ]; then
    echo /usr/local/cuda/bin/nvcc
  else
    return 1
  fi
}

# Whether an NVIDIA driver with at least one GPU is here.
have_gpu() { [ -e /dev/nvidia0 ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; }

# Prints the comment block at the top of the calling script: its --help.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }
