"""launch/train.slurm and detect.slurm with stand-ins for srun and scontrol: what is started, and queued again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "train.slurm"


@pytest.mark.parametrize(
    ("status", "ended", "queued"), [(0, 0, False), (75, 0, True), (138, 0, True), (2, 2, False), (137, 137, False)]
)
def test_only_a_run_that_saved_is_queued_again(status, ended, queued, tmp_path):
    calls = tmp_path / "calls"
    stand_in(tmp_path / "bin" / "srun", f'echo "srun $*" >> {calls}; exit {status}')
    stand_in(tmp_path / "bin" / "scontrol", f'echo "scontrol $*" >> {calls}')
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "RE2TAL_VENV": "venv",
    }
    done = subprocess.run(["bash", str(SCRIPT), "--recipe", "demo", "--out", "a folder"], env=environment, check=False)
    assert done.returncode == ended
    expected = [
        "srun --cpus-per-task=8 --wait=60 python -u launch/train.py --resume --recipe demo --out a folder",
        *(["scontrol requeue 123456"] if queued else []),
    ]
    assert calls.read_text().splitlines() == expected


def test_a_job_that_never_saves_anything_new_is_not_queued_for_ever(tmp_path):
    calls, checkpoints = tmp_path / "calls", tmp_path / "a run" / "checkpoints"
    stand_in(tmp_path / "bin" / "srun", "exit 75")
    stand_in(tmp_path / "bin" / "scontrol", f"echo queued >> {calls}")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "RE2TAL_VENV": "venv",
    }

    def submit() -> int:
        command = ["bash", str(SCRIPT), "--out", "a run"]
        return subprocess.run(command, env=environment, check=False, capture_output=True).returncode

    assert [submit() for _ in range(4)] == [0, 0, 0, 75]
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("step-00000100\n")
    assert [submit() for _ in range(4)] == [0, 0, 0, 75]
    assert calls.read_text().splitlines() == ["queued"] * 6


def test_without_a_run_folder_nothing_is_started(tmp_path):
    calls = tmp_path / "calls"
    for name in ("srun", "scontrol"):
        stand_in(tmp_path / "bin" / name, f"echo {name} >> {calls}")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    command = ["bash", str(SCRIPT), "--recipe", "demo"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "give --out FOLDER, the run folder" in done.stderr
    assert not calls.exists()


def test_outside_a_job_it_says_how_to_start():
    done = subprocess.run(
        ["bash", str(SCRIPT)], env={"PATH": os.environ["PATH"]}, check=False, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "start it with sbatch" in done.stderr


@pytest.mark.parametrize("status", [0, 1, 2])
def test_detection_is_one_task_that_keeps_its_exit_status(status, tmp_path):
    calls = tmp_path / "calls"
    stand_in(tmp_path / "bin" / "srun", f'printf "%s|" "$@" >> {calls}; exit {status}')
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "RE2TAL_VENV": "venv",
    }
    command = ["bash", str(SCRIPT.with_name("detect.slurm")), "--run", "a run"]
    assert subprocess.run(command, env=environment, check=False).returncode == status
    assert calls.read_text() == "--ntasks=1|--cpus-per-task=8|re2tal|detect|--run|a run|"


def stand_in(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
