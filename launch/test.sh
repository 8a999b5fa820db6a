#!/usr/bin/env bash
# The whole test suite on a fresh machine: environment, linters, types, tests. Extra arguments go to pytest:
#   bash launch/test.sh -k swin            bash launch/test.sh -m slow            bash launch/test.sh -m gpu
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ruff check .
ruff format --check .
mypy
shellcheck -x launch/*.sh launch/*.slurm .ci/run
# The whole suite takes two processes; tests/conftest.py says what runs side by side. Arguments may choose tests that need
# the machine for themselves (-m gpu, -m slow), or a debugger: then pytest gets them, and nothing else.
if [[ $# -eq 0 && $(nproc) -ge 2 ]]; then
    set -- --numprocesses 2 --dist loadscope
fi
# Two ranks share the machine in many tests: one thread each keeps them from fighting over cores.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest "$@"
