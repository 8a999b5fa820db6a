"""benchmarks/gpu.py: in small on a CPU, and on a CUDA device what it measures held to what the project claims."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def measured(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    found = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARK), *arguments, "--json", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found.read_text())


@pytest.mark.slow
def test_every_part_runs_in_small_on_a_cpu(tmp_path: Path) -> None:
    parts = measured(tmp_path, "--device", "cpu", "--minutes", "1.5")
    assert list(parts) == [
        "machine",
        "exactness",
        "training",
        "memory",
        "longest",
        "planner",
        "offload",
        "loader",
        "coupling",
    ]
    assert parts["machine"]["rows"][0]["torch"] == torch.__version__
    exact = parts["exactness"]["rows"]
    assert exact
    assert all(row["drift"] == 0 and row["equal"] >= (row["way"] == "whole") for row in exact)


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(tmp_path: Path, monkeypatch) -> None:
    broken = tmp_path / "transformers.py"
    broken.write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    found = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--part", "machine", "--part", "coupling", "--json", str(found)]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *options])
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    with pytest.raises(SystemExit, match="not whole: machine"):
        runpy.run_path(str(BENCHMARK), run_name="__main__")
    parts = json.loads(found.read_text())
    assert "broken on purpose" in parts["machine"]["log"]
    assert parts["coupling"]["ended"] == "whole"


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_on_cuda_backward_rebuilds_the_same_bits_and_zero_trains(tmp_path: Path) -> None:
    parts = measured(tmp_path, "--minutes", "8", "--part", "exactness", "--part", "training", "--part", "offload")
    exact = parts["exactness"]["rows"]
    assert len(exact) == 72
    assert [row for row in exact if row["drift"] != 0 or not row["finite"]] == []
    assert [row for row in exact if row["way"] == "whole" and row["difference"] > max(1e-6, 2 * row["noise"])] == []
    assert {(row["recipe"], row["zero"]) for row in parts["training"]["rows"] if row["steps"] >= 2} == {
        ("demo", 2),
        ("demo", 3),
        ("activitynet_re2swin_tiny", 2),
        ("activitynet_re2swin_tiny", 3),
    }
