"""A job with a time limit: SIGUSR1 at random moments, and the job script queues it again once each, to the same end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults.runs import ROOT, alone, small, wait_for
from safetensors.torch import load_file

SIGNALS = 10


def stand_in(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_is_signalled_again_and_again_is_queued_once_each_and_ends_alike(
    features, tmp_path, record_property
):
    calls, pid = tmp_path / "calls", tmp_path / "pid"
    # As srun does it: the task is a process of its own, which alone gets the signal.
    task = f'shift 2; echo $$ > {pid}.tmp; mv {pid}.tmp {pid}; shift 2; exec {sys.executable} "$@"'
    stand_in(tmp_path / "bin" / "srun", task)
    stand_in(tmp_path / "bin" / "scontrol", f'echo "$*" >> {calls}')
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    environment = {
        **alone(),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "RE2TAL_VENV": str(tmp_path / "venv"),
    }

    def submit(out: Path) -> subprocess.Popen:
        pid.unlink(missing_ok=True)
        options = ["--training.epochs", "400", "--training.log-every-steps", "100"]
        command = ["bash", str(ROOT / "launch" / "train.slurm"), *small(features, out, *options)]
        with out.with_suffix(".log").open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    record_property("tried", SIGNALS)
    assert submit(tmp_path / "whole").wait(timeout=400) == 0
    out, dice, newest = tmp_path / "halved", random.Random(0), tmp_path / "halved" / "checkpoints" / "latest"
    try:
        for number in range(SIGNALS):
            job = submit(out)
            # The first in start-up, the others from there to the last evaluation.
            wait_for(lambda: pid.exists() and (not number or (out / "lock").exists()), 100)  # noqa: B023
            time.sleep(dice.uniform(0.0, 3.0))
            os.kill(int(pid.read_text()), signal.SIGUSR1)
            assert job.wait(timeout=400) == 0, out.with_suffix(".log").read_text()[-3000:]
            assert calls.read_text().splitlines() == ["requeue 123456"] * (number + 1)
            if not newest.exists():  # stopped in start-up, which the script counts
                (ROOT / ".requeued-123456").unlink(missing_ok=True)
        assert submit(out).wait(timeout=400) == 0
    finally:
        (ROOT / ".requeued-123456").unlink(missing_ok=True)
    assert len(calls.read_text().splitlines()) == SIGNALS
    expected, weights = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
