#!/usr/bin/env bash
# Makes data/kjv.txt, the README's text: the King James Bible of Debian's package bible-kjv.
#
#   scripts/fetch_text.sh
#
# One verse a line with its reference, 31,102 lines and 4.4 MB, as `bible -f 'ge1:1-re22:21'` prints them:
#   Ge1:1 In the beginning God created the heaven and the earth.
# Installs the package when it is missing (as root or with sudo). Run again, it does nothing when the file is whole.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

case "${1:-}" in
  "") ;;
  -h | --help) usage && exit 0 ;;
  *) die "unknown argument '$1' (there is none but --help)" ;;
esac

text=data/kjv.txt
verses=31102

whole() {
  [ -f "$1" ] && [ "$(wc -l <"$1")" = "$verses" ] && [ "$(head -c 6 "$1")" = "Ge1:1 " ] &&
    tail -n 1 "$1" | grep -q '^Rev22:21 '
}

if whole "$text"; then
  say "$text is there ($verses verses)."
  exit 0
fi

if ! command -v bible >/dev/null; then
  say "Installing Debian's package bible-kjv, which holds the text"
  sudo=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || die "installing bible-kjv needs root or sudo: run 'apt-get install bible-kjv' as root once"
    sudo=(sudo)
  fi
  command -v apt-get >/dev/null || die "bible-kjv is a Debian package and apt-get was not found; put a text of your own at $text instead"
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  { "${sudo[@]}" apt-get update -q && "${sudo[@]}" apt-get install -y -q --no-install-recommends bible-kjv; } \
    >"$log" 2>&1 </dev/null || { tail -5 "$log" >&2; die "apt-get could not install bible-kjv (see above)"; }
  hash -r
  command -v bible >/dev/null || PATH=$PATH:/usr/games
  command -v bible >/dev/null || die "bible-kjv is installed but its program 'bible' was not found"
fi

mkdir -p data
bible -f 'ge1:1-re22:21' >"$text.tmp" </dev/null || die "'bible -f' failed; the package bible-kjv may be damaged"
whole "$text.tmp" || die "'bible -f' printed $(wc -l <"$text.tmp") lines where $verses verses were expected (left in $text.tmp)"
mv "$text.tmp" "$text"
say "$text: $verses verses, $(wc -c <"$text") bytes."
