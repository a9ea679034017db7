#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv once, with the extras asked for, pinned by ci/constraints.txt.
# `set_up dev,trl` returns at once where that is done already, so everything works offline after the first run.
# pip is used with the configuration it finds; DPOCHECK_PYTHON names another Python than python3.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
python="$venv/bin/python"

set_up() {
  local extras=$1 stamp
  stamp="$venv/.dpocheck-$(cat "$root/pyproject.toml" "$root/ci/constraints.txt" | cksum | cut -d' ' -f1)-${extras//,/-}"
  [ -e "$stamp" ] && return 0
  local started=$SECONDS
  echo "setting up .venv (once): the package with [$extras] and its pinned dependencies" >&2
  local base=${DPOCHECK_PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$base is $("$base" --version 2>&1); dpocheck needs Python 3.11 or newer: set DPOCHECK_PYTHON to one" >&2
    return 2
  }
  [ -x "$python" ] || "$base" -m venv "$venv" || return 2
  "$python" -m pip install --quiet --disable-pip-version-check -c "$root/ci/constraints.txt" -e "$root[$extras]" || {
    echo "pip could not install the dependencies (see above); where there is no GPU, point pip at a CPU build of torch" >&2
    return 2
  }
  touch "$stamp"
  echo "set up in $((SECONDS - started)) s" >&2
}
