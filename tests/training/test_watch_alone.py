"""The watch over a run of one rank: it ends a main thread that makes no progress, and none that does."""

from __future__ import annotations

import os
import time

import pytest

from re2tal.training.watchdog import Place, Stay, _watched_alone, at

IDLE, BUSY = 0.0, 1.9
"""Seconds of a core within 2 seconds."""

CASES = [
    # looks at one place, seconds between them, whether it may take long, what the process computed, whether it is ended
    (5, 2.0, False, IDLE, False),
    (6, 2.0, False, IDLE, True),
    (6, 2.0, False, BUSY, True),
    (15, 2.0, True, IDLE, False),
    (16, 2.0, True, IDLE, True),
    (16, 2.0, True, 0.04, True),
    (1000, 2.0, True, 0.05, False),
    (1, 3600.0, False, IDLE, False),
    (2, 3600.0, False, IDLE, False),
    (3, 3600.0, False, IDLE, True),
]


@pytest.mark.parametrize(("looks", "seconds", "patient", "computed", "ended"), CASES)
def test_a_stay_is_too_long_after_its_limit_in_seconds_that_count(looks, seconds, patient, computed, ended):
    stay, place = Stay(limit_seconds=10.0, interval_seconds=2.0), Place(patient=patient)
    assert not stay.is_too_long(place, seconds, computed)
    assert any([stay.is_too_long(place, seconds, computed) for _ in range(looks)]) == ended


def test_progress_starts_the_count_anew():
    stay = Stay(limit_seconds=10.0, interval_seconds=2.0)
    places = [Place(patient=False) for _ in range(100)]
    assert not any([stay.is_too_long(place, 2.0, IDLE) for place in places for _ in range(5)])


def test_who_hangs_is_ended_with_its_stacks(tmp_path, monkeypatch, capsys):
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    with _watched_alone(tmp_path, limit_seconds=0.5, exit_status=77):
        at("step 0")
        deadline = time.monotonic() + 60
        while not statuses and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(statuses) == {77}
    assert "at 'step 0', and the run ends. Its stacks are in" in capsys.readouterr().err
    assert "in test_who_hangs_is_ended" in (tmp_path / "stacks" / "rank-00000.txt").read_text()


def test_who_makes_progress_is_not(tmp_path, monkeypatch):
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    with _watched_alone(tmp_path, limit_seconds=5.0, exit_status=77):
        for step in range(60):
            at(f"step {step}")
            time.sleep(0.1)
    assert not statuses
    assert not (tmp_path / "stacks").exists()
