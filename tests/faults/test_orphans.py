"""Launchers that are killed or told to stop: their ranks save and end, and none goes on alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from data.feature_folders import write_features
from distributed.ranks import free_port

from re2tal.distributed import World
from re2tal.structures import Action

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    for number, subset in enumerate(("training", "validation")):
        generator = torch.Generator().manual_seed(number)
        values = {f"{subset}{n}": torch.randn(12, 20 + n, generator=generator) for n in range(4)}
        write_features(folder / subset, values, actions=[Action(1.0, 3.0, "jump")], classes=("jump",))
    return folder


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
    command = [*start, str(ROOT / "launch" / "train.py"), "--ds", "zero2", "--data.shards", str(features)]
    command += ["--localizer.channels", "16", "--engine.batch-size", "1", "--data.clips.workers", "1"]
    command += ["--training.epochs", "100000", "--training.checkpoint-every-steps", "1000000"]
    command += ["--training.log-every-steps", "2", "--out", str(out)]
    alone = {name: value for name, value in os.environ.items() if name not in World().variables()}
    environment = {**alone, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    with (out.parent / "log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for(condition, seconds: float, what: str, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {log.read_text()[-3000:]}"
        time.sleep(0.2)


CASES = [
    ("deepspeed", "runner", signal.SIGTERM),
    ("deepspeed", "runner", signal.SIGINT),
    ("deepspeed", "runner", signal.SIGKILL),
    ("deepspeed", "launch", signal.SIGKILL),
    ("deepspeed", "launch", signal.SIGTERM),
    ("deepspeed", "group", signal.SIGINT),
    ("torchrun", "runner", signal.SIGKILL),
    ("torchrun", "runner", signal.SIGTERM),
]


@pytest.mark.parametrize(
    ("launcher", "victim", "number"),
    [case if case == CASES[0] else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_ranks_save_and_end_with_their_launcher(launcher, victim, number, features, tmp_path):
    out = tmp_path / "run"
    runner = launched(launcher, features, out)
    log = tmp_path / "log"
    try:
        wait_for(lambda: (out / "metrics.jsonl").exists(), 150, "never trained", log)
        match victim:
            case "runner":
                runner.send_signal(number)
            case "launch":
                [launch] = [pid for pid, command in processes_of(out).items() if "deepspeed.launcher.launch" in command]
                os.kill(launch, number)
            case "group":
                os.killpg(runner.pid, number)
        wait_for(lambda: runner.poll() is not None and not processes_of(out), 60, "still there", log)
        assert list((out / "checkpoints").glob("step-*")), log.read_text()[-3000:]
        assert not (out / "lock").exists()
    finally:
        for pid in processes_of(out):
            os.kill(pid, signal.SIGKILL)
        runner.kill()
        runner.wait()
