"""The watch over a run of one rank: it ends a main thread that makes no progress, and none that does."""

from __future__ import annotations

import os
import time

import pytest

from re2tal.training.watchdog import _watched_alone, at

CASES = [
    # steps, seconds of each, whether they may take long, whether the run is ended
    (1, 2.0, False, True),
    (20, 0.1, False, False),
    (1, 2.0, True, False),
]


@pytest.mark.parametrize(("steps", "pause_seconds", "patient", "ended"), CASES)
def test_who_makes_no_progress_is_ended_with_its_stacks(
    steps, pause_seconds, patient, ended, tmp_path, monkeypatch, capsys
):
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    with _watched_alone(tmp_path, limit_seconds=1.0, exit_status=77):
        for step in range(steps):
            at(f"step {step}", patient=patient)
            time.sleep(pause_seconds)
    assert bool(statuses) == ended
    assert set(statuses) <= {77}
    assert ("at 'step 0', and the run ends. Its stacks are in" in capsys.readouterr().err) == ended
    stacks = tmp_path / "stacks" / "rank-00000.txt"
    assert ended == stacks.exists()
    assert not ended or "in test_who_makes_no_progress" in stacks.read_text()
