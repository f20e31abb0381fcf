#!/usr/bin/env bash
#   scripts/verify_installation.sh [--no-self-test]
#
# Builds the program if needed and runs `dsv3 verify`: what this machine has, what will be used, and a numeric
# self-test of each operator on each device. Exit code 0: all that is needed works.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"
case "${1:-}" in -h | --help) usage && exit 0 ;; esac
scripts/build_kernels.sh dsv3
exec build/release/bin/dsv3 verify "$@"
