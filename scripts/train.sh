#!/usr/bin/env bash
# Trains from one config, doing first whatever is missing: set-up, build, data.
#
#   scripts/train.sh                                        configs/deepseek_v3_tiny.yaml
#   scripts/train.sh CONFIG.yaml [key=value …] [OPTIONS]    as `dsv3 train` takes them
#
# Examples:
#   scripts/train.sh configs/deepseek_v3_tiny.yaml
#   scripts/train.sh configs/deepseek_v3_tiny.yaml training.steps=600 --out runs/short
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case "${1:-}" in
  -h | --help) usage && exit 0 ;;
  "") config=$root/configs/deepseek_v3_tiny.yaml ;;
  *) config=$(realpath -m -- "$1") && shift ;;
esac
[ -f "$config" ] || [ ! -f "$root/configs/$(basename "$config")" ] ||
  die "there is no $config (did you mean configs/$(basename "$config")?)"
[ -f "$config" ] || die "there is no config $config (configs/ holds: $(cd "$root/configs" && echo *.yaml))"
cd "$root"

[ -e third_party/libtorch/lib/libtorch_cpu.so ] || scripts/setup.sh
scripts/build_kernels.sh dsv3
if { grep -q "data/kjv\.txt" "$config" || [[ "$*" == *data/kjv.txt* ]]; } && [ ! -s data/kjv.txt ]; then scripts/fetch_text.sh; fi
exec build/release/bin/dsv3 train "$(realpath --relative-to=. "$config")" "$@"
