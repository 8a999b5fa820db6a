"""The lock of a build that was killed half-way keeps no run waiting: nothing is compiled at the start."""

from __future__ import annotations

import subprocess
import sys

import pytest
from faults.runs import TRAIN, alone, ends_of, small, start_ranks

LOCK_ALL = """
import pathlib, sys
import torch.utils.cpp_extension as extension
from deepspeed.ops.op_builder.all_ops import ALL_OPS
for name in ALL_OPS:
    folder = pathlib.Path(extension._get_build_directory(name, verbose=False))
    (folder / "lock").touch()
print(len(ALL_OPS))
"""


@pytest.mark.parametrize(
    "ds", ["zero2_offload", *(pytest.param(ds, marks=pytest.mark.slow) for ds in ("zero1", "zero3", "zero3_offload"))]
)
def test_locks_of_all_operators_of_deepspeed_stop_no_run(ds, features, tmp_path):
    extensions = tmp_path / "extensions"
    environment = {"TORCH_EXTENSIONS_DIR": str(extensions)}
    locked = subprocess.run(
        [sys.executable, "-c", LOCK_ALL], env={**alone(), **environment}, capture_output=True, text=True, check=True
    )
    assert int(locked.stdout.splitlines()[-1]) == len(list(extensions.rglob("lock"))) > 5
    options = ["--ds", ds, "--training.epochs", "1", "--schedule.warmup-epochs", "0.5"]
    command, log = [*TRAIN, *small(features, tmp_path / "run", *options)], tmp_path / "log"
    assert ends_of(start_ranks([command] * 2, [log] * 2, **environment), log) == [0, 0], log.read_text()[-4000:]
    assert not list(extensions.rglob("*.so"))
