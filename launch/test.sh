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
# Two ranks share the machine in many tests: one thread each keeps them from fighting over cores.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest "$@"
