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
from distributed.ranks import _Fork, launch_ranks, run_ranks


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


def test_a_rank_whose_server_is_gone_has_failed(tmp_path: Path) -> None:
    script = "read order; setsid sleep 60 > /dev/null & echo $!"
    server = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    with server:
        assert _Fork(server, {}, tmp_path / "log", []).wait() == -signal.SIGKILL


def test_a_failing_rank_ends_the_others_and_shows_its_output() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 ended with 1.*rank one had enough"):
        run_ranks(fail_in_rank_one, world_size=2)
    assert time.monotonic() - start < 50


def test_a_hang_ends_when_the_time_is_up() -> None:
    with pytest.raises(RuntimeError, match=r"not done after 0\.5 s"):
        launch_ranks([sys.executable, "-c", "import time; time.sleep(60)"], world_size=2, timeout_seconds=0.5)
