#!/usr/bin/env bash
# Formats all C++ and CUDA sources with clang-format 14 (other versions disagree in details).
#
#   scripts/format.sh            rewrites the files
#   scripts/format.sh --check    changes nothing; names the files that differ, exit code 1 if there are some
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"
case "${1:-}" in
  "") action=-i ;;
  --check) action="--dry-run" ;;
  -h | --help) usage && exit 0 ;;
  *) die "unknown argument '$1' (there is --check)" ;;
esac

formatter=""
for candidate in clang-format-14 clang-format; do
  if command -v "$candidate" >/dev/null && "$candidate" --version | grep -q 'version 14\.'; then
    formatter=$candidate
    break
  fi
done
[ -n "$formatter" ] || die "clang-format 14 was not found (apt-get install clang-format-14)"

mapfile -t files < <(find src tests bench -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) | sort)
differ=0
for file in "${files[@]}"; do
  if [ "$action" = -i ]; then
    "$formatter" -i "$file"
  elif ! "$formatter" "$file" | cmp -s - "$file"; then
    say "$file: not formatted (run scripts/format.sh)"
    differ=$((differ + 1))
  fi
done
[ "$differ" = 0 ] || die "$differ of ${#files[@]} files are not formatted"
say "format: ${#files[@]} files"
