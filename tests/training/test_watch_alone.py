"""The watch over a run of one rank: it ends a main thread that makes no progress, and none that does."""

from __future__ import annotations

import os
import time

import pytest

from re2tal.training.watchdog import _watched_alone, at

CASES = [
    # steps, seconds of each, whether they may take long, whether they compute, whether the run is ended
    (1, 1.0, False, True, True),
    (20, 0.05, False, False, False),
    (1, 0.7, True, False, False),
    (1, 2.3, True, False, True),
    (1, 2.3, True, True, False),
]


@pytest.mark.parametrize(("steps", "seconds", "patient", "computes", "ended"), CASES)
def test_who_makes_no_progress_is_ended_with_its_stacks(
    steps, seconds, patient, computes, ended, tmp_path, monkeypatch, capsys
):
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    with _watched_alone(tmp_path, limit_seconds=0.5, exit_status=77):
        for step in range(steps):
            at(f"step {step}", patient=patient)
            deadline = time.monotonic() + seconds
            while computes and time.monotonic() < deadline:
                pass
            time.sleep(max(deadline - time.monotonic(), 0))
    assert bool(statuses) == ended
    assert set(statuses) <= {77}
    assert ("at 'step 0', and the run ends. Its stacks are in" in capsys.readouterr().err) == ended
    stacks = tmp_path / "stacks" / "rank-00000.txt"
    assert ended == stacks.exists()
    assert not ended or "in test_who_makes_no_progress" in stacks.read_text()
