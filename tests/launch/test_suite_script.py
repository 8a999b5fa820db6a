"""launch/test.sh with stand-ins for what it calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from launch.test_train_slurm import stand_in

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("told", [{}, {"OMP_NUM_THREADS": "1"}], ids=["nothing told", "one thread"])
@pytest.mark.parametrize(
    ("cores", "arguments", "expected"),
    [
        ("2", [], "-m pytest --numprocesses 2 --dist loadscope"),
        ("1", [], "-m pytest"),
        ("2", ["-k", "swin"], "-m pytest -k swin"),
    ],
)
def test_the_whole_suite_takes_two_cores_where_there_are_two(told, cores, arguments, expected, tmp_path) -> None:
    calls = tmp_path / "calls"
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "test.sh", tmp_path / "launch")
    (tmp_path / "launch" / "environment.sh").write_text("")
    for tool in ("ruff", "shellcheck", "mypy"):
        stand_in(tmp_path / "bin" / tool, "exit 0")
    stand_in(tmp_path / "bin" / "nproc", f'echo "${{OMP_NUM_THREADS:-{cores}}}"')
    stand_in(tmp_path / "bin" / "python", f'echo "$OMP_NUM_THREADS $*" >> {calls}')
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **told}
    command = ["bash", str(tmp_path / "launch" / "test.sh"), *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert calls.read_text().splitlines() == [f"1 {expected}"]
