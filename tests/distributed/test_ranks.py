"""The helper that starts ranks: results in order, failures and hangs reported with the ranks' output."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from distributed.forks import Fork
from distributed.ranks import environments, launch_ranks, run_ranks


def sum_of_ranks(*, scale: float) -> dict:
    dist.init_process_group("gloo")
    total = torch.tensor(scale * (dist.get_rank() + 1))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {"rank": int(os.environ["RANK"]), "total": total}


def fail_in_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one had enough")
    time.sleep(60)


def test_results_come_in_order_of_rank() -> None:
    results = run_ranks(sum_of_ranks, world_size=2, scale=10.0)
    assert [result["rank"] for result in results] == [0, 1]
    assert all(result["total"] == 30 for result in results)


def draws() -> list[float]:
    return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]


def test_nothing_that_nobody_seeded_is_drawn_twice() -> None:
    """Else two runs would agree although neither sets its seed."""
    found = [run_ranks(draws, world_size=2) for _ in range(2)]
    assert len({number for run in found for rank in run for number in rank}) == 2 * 2 * 3


def fork(code: str, log: Path) -> Fork:
    return Fork([sys.executable, "-c", code], server=0, environment=environments(1)[0], log=log)


def test_a_fork_ends_as_a_process_of_its_command_does(tmp_path: Path) -> None:
    log, ends = tmp_path / "log", {"pass": 0, "raise SystemExit(3)": 3, "raise SystemExit('no')": 1, "1 / 0": 1}
    for code, status in ends.items():
        assert fork(code, log).wait() == status, code
    assert "no\n" in log.read_text()
    assert "ZeroDivisionError" in log.read_text()
    code = "import sys, threading; threading.Timer(0.3, print, ['late']).start(); print(*sys.argv)"
    assert Fork([sys.executable, "-c", code, "a"], server=0, environment=environments(1)[0], log=log).wait() == 0
    assert log.read_text().endswith("-c a\nlate\n")


def test_a_fork_is_stopped_killed_and_waited_for_beside_others(tmp_path: Path) -> None:
    first, second = (fork("import time; time.sleep(600)", tmp_path / "log") for _ in range(2))
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(timeout=0.1)
    first.send_signal(signal.SIGSTOP)
    assert (first.poll(), second.poll()) == (None, None)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    second.send_signal(signal.SIGTERM)
    assert second.wait() == -signal.SIGTERM


def test_a_fork_that_nobody_waits_for_any_more_has_failed_and_ends(tmp_path: Path) -> None:
    process = fork("import os, time; print(os.getppid(), flush=True); time.sleep(600)", tmp_path / "log")
    while not (said := (tmp_path / "log").read_text()):
        time.sleep(0.02)
    os.kill(int(said), signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while Path(f"/proc/{process.pid}/stat").exists() and " Z " not in Path(f"/proc/{process.pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_failing_rank_ends_the_others_and_shows_its_output() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 ended with 1.*rank one had enough"):
        run_ranks(fail_in_rank_one, world_size=2)
    assert time.monotonic() - start < 50


def test_a_hang_ends_when_the_time_is_up() -> None:
    with pytest.raises(RuntimeError, match=r"not done after 0\.5 s"):
        launch_ranks([sys.executable, "-c", "import time; time.sleep(60)"], world_size=2, timeout_seconds=0.5)
