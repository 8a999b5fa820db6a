#!/usr/bin/env bash
# Sourced by quickstart.sh and test.sh: puts the pinned requirements and this package into .venv, once, and activates it.
# A stamp named after requirements.txt and pyproject.toml makes a second call free; an interrupted install is repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
        if [[ -n "$candidate" ]] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "re2tal needs Python 3.11 or 3.12 and found none; install one or name it: PYTHON=/path/to/python3.12 bash $0" >&2
    return 1
}

# Packages are installed uncompiled, see below: told not to write bytecode, each process would compile all of them again.
unset PYTHONDONTWRITEBYTECODE

stamp=".venv/installed-$(cat requirements.txt pyproject.toml | cksum | cut -d ' ' -f 1)"
if [[ ! -f "$stamp" ]]; then
    python=$(find_python)
    echo "Installing requirements.txt into .venv with $("$python" --version)"
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    # Python compiles what is imported; pip would compile all 13,000 files first, for half a minute.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    rm -f .venv/installed-*
    touch "$stamp"
fi
# shellcheck disable=SC1091  # written by python -m venv above
source .venv/bin/activate
