#!/usr/bin/env bash
# The whole test suite on a fresh machine: environment, linters, types, tests. Extra arguments go to pytest:
#   bash launch/test.sh -k swin            bash launch/test.sh -m slow            bash launch/test.sh -m gpu
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ruff check .
ruff format --check .
shellcheck -x launch/*.sh launch/*.slurm .ci/run
cores=$(env --unset=OMP_NUM_THREADS nproc)  # which tells threads where they are set
# Two ranks share the machine in many tests: one thread each keeps them from fighting over cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Arguments may choose tests that need the machine for themselves (-m gpu, -m slow), or a debugger: then pytest gets them,
# and nothing else.
if [[ $# -gt 0 || $cores -lt 2 ]]; then
    mypy
    exec python -m pytest "$@"
fi
# The whole suite takes two processes; tests/conftest.py says what runs side by side. Types would take one core for a
# minute or two, so they are checked beside the first tests, and what is wrong with them is said at the end.
said=$(mktemp)
mypy >"$said" 2>&1 &
types=$!
status=0
python -m pytest --numprocesses 2 --dist loadscope || status=$?
wait "$types" || status=$?
cat "$said"
rm "$said"
exit "$status"
