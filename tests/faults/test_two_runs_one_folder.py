"""A run folder has one writer: a second one is refused while the first lives, and takes over when it is dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed.ranks import PATIENCE
from faults.runs import TRAIN, end, ends_of, small, start_ranks, wait_for

from re2tal.runs import lock
from re2tal.runs.exit_status import INTERRUPTED

HOLDER = """
import sys, time
from re2tal.runs import lock
lock.BEAT_SECONDS = 0.1
if len(sys.argv) > 2:
    lock._place = lambda: sys.argv[2]
with lock.locked(__import__("pathlib").Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the lock of `tmp_path`, from another place if one is given."""
    started = []

    def start(*place: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), *place],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)


def taken(folder: Path) -> bool:
    with lock.locked(folder):
        return json.loads((folder / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_lasts_as_long_as_its_run_and_leaves_nothing(tmp_path):
    assert taken(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_living_owner_is_named_and_a_dead_one_replaced_at_once(hold, tmp_path, capsys):
    owner = hold()
    with pytest.raises(ValueError, match=rf"is in use by a run on host \S+, process {owner.pid}; wait for it"):
        taken(tmp_path)
    owner.send_signal(signal.SIGSTOP)  # it may go on at any moment
    with pytest.raises(ValueError, match="is in use by"):
        taken(tmp_path)
    owner.kill()
    owner.wait()
    assert taken(tmp_path)
    assert f"taking over {tmp_path} from process {owner.pid}" in capsys.readouterr().err


def test_a_process_number_that_another_program_has_now_is_no_owner(tmp_path):
    mine = {"host": "here", "pid": os.getppid(), "place": lock._place(), "start": 1, "beats": 3}
    (tmp_path / "lock").write_text(json.dumps(mine))
    assert taken(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00", b"[]", b"{}", b'{"pid": "x"}'])
def test_a_lock_that_names_nobody_is_replaced(content, tmp_path):
    (tmp_path / "lock").write_bytes(content)
    assert taken(tmp_path)


def test_an_owner_on_another_machine_lives_while_it_beats(hold, tmp_path):
    owner = hold("another machine")
    with pytest.raises(ValueError, match=rf"in use by a run on host \S+, process {owner.pid}"):
        taken(tmp_path)


def test_silent_locks_of_other_machines_are_watched_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    owner = {"host": "gone", "pid": 1, "place": "another machine", "start": 1, "beats": 3}
    parts = [tmp_path / str(number) for number in range(20)]
    for part in parts:
        part.mkdir()
        (part / "lock").write_text(json.dumps(owner))
    start = time.monotonic()
    lock.refuse_in_use(*parts)
    assert time.monotonic() - start < 2  # one after the other: 4


def test_an_owner_on_another_machine_that_is_silent_loses_the_folder_and_ends_when_it_wakes(hold, tmp_path):
    owner = hold("another machine")
    owner.send_signal(signal.SIGSTOP)
    with lock.locked(tmp_path):
        owner.send_signal(signal.SIGCONT)
        assert owner.wait(timeout=20) == 1
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert f"now belongs to process {os.getpid()}" in owner.communicate()[1]


def test_of_many_that_take_over_at_once_one_wins(hold, tmp_path):
    dead = hold()
    dead.kill()
    dead.wait()
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    try:
        deadline = time.monotonic() + 60
        while sum(taker.poll() is None for taker in takers) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        winners = [taker for taker in takers if taker.poll() is None]
        assert len(winners) == 1
        assert json.loads((tmp_path / "lock").read_text())["pid"] == winners[0].pid
    finally:
        for taker in takers:
            taker.kill()
            taker.communicate()


def test_a_second_run_on_a_live_folder_is_refused_and_one_on_a_dead_goes_on(features, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    options = ["--training.checkpoint-every-steps", "5", "--training.epochs", "100000"]
    command = [*TRAIN, *small(features, out, *options)]
    [first] = start_ranks([command], [tmp_path / "log of the first"])
    try:
        wait_for(lambda: (out / "checkpoints" / "latest").exists() or first.poll() is not None, 120)
        for how in ("--resume", "--overwrite"):
            refusal = tmp_path / f"log of {how}"
            [second] = start_ranks([[*command, how]], [refusal])
            assert ends_of([second], refusal, seconds=120) == [2]
            assert f"process {first.pid}; wait for it or end it" in refusal.read_text()
        assert first.poll() is None
        assert (out / "metrics.jsonl").exists()
    finally:
        end([first])
    [third] = start_ranks([[*command, "--resume"]], [log])
    try:
        wait_for(lambda: "\nstep " in log.read_text(), 120, log)
        assert f"taking over {out} from process {first.pid}" in log.read_text()
        assert "resumed at step" in log.read_text()
        third.send_signal(signal.SIGTERM)
        assert third.wait(timeout=PATIENCE * 120) == INTERRUPTED
        assert not (out / "lock").exists()
    finally:
        end([third])
