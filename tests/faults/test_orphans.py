"""Launchers that are killed or told to stop: their ranks save and end, and none goes on alone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from distributed.ranks import free_port
from faults.runs import BIN, TRAIN, alone, small, wait_for


def processes_of(out: Path) -> dict[int, str]:
    """Those that have the run folder in their command, by number."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_text().replace("\0", " ")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(out) in command and state != "Z":
            found[int(entry.name)] = command
    return found


def launched(launcher: str, features: Path, out: Path) -> subprocess.Popen:
    port = str(free_port())
    start = {
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port],
    }[launcher]
    options = ["--ds", "zero2", "--training.epochs", "100000", "--training.checkpoint-every-steps", "1000000"]
    options += ["--training.log-every-steps", "2"]
    command = [*start, TRAIN[1], *small(features, out, *options, workers=1)]
    environment = {**alone(), "PATH": f"{BIN}:{os.environ['PATH']}"}
    with (out.parent / "log").open("w") as log:
        return subprocess.Popen(
            ["env", "--default-signal=INT,HUP", *command],  # jobs in the background of a script ignore them
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


CASES = [
    ("deepspeed", "runner", signal.SIGTERM),
    ("deepspeed", "runner", signal.SIGINT),
    ("deepspeed", "runner", signal.SIGKILL),
    ("deepspeed", "launch", signal.SIGKILL),
    ("deepspeed", "launch", signal.SIGTERM),
    ("deepspeed", "group", signal.SIGINT),
    ("deepspeed", "group", signal.SIGTERM),
    ("torchrun", "runner", signal.SIGKILL),
    ("torchrun", "runner", signal.SIGTERM),
    ("torchrun", "group", signal.SIGINT),
]
MOMENTS = (0.0, 1.3)
"""Seconds after the first line of the log: in a step, and later."""


@pytest.mark.parametrize(
    ("launcher", "victim", "number", "after"),
    [
        pytest.param(*case, after, marks=() if (case, after) == (CASES[0], 0.0) else pytest.mark.slow)
        for case in CASES
        for after in MOMENTS
    ],
)
def test_ranks_save_and_end_with_their_launcher(launcher, victim, number, after, features, tmp_path):
    out = tmp_path / "run"
    runner = launched(launcher, features, out)
    log = tmp_path / "log"
    try:
        wait_for(lambda: (out / "metrics.jsonl").exists(), 150, log)
        time.sleep(after)
        match victim:
            case "runner":
                runner.send_signal(number)
            case "launch":
                [launch] = [pid for pid, command in processes_of(out).items() if "deepspeed.launcher.launch" in command]
                os.kill(launch, number)
            case "group":
                os.killpg(runner.pid, number)
        wait_for(lambda: runner.poll() is not None and not processes_of(out), 60, log)
        assert list((out / "checkpoints").glob("step-*")), log.read_text()[-3000:]
        assert not (out / "lock").exists()
    finally:
        for pid in processes_of(out):
            os.kill(pid, signal.SIGKILL)
        runner.kill()
        runner.wait()
