"""What asks a run to stop is noted wherever the process is; the third request does not wait."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time

import pytest

from re2tal.training.signals import PARENT_IS_GONE, STOP_SIGNALS, stop_requests

WAITING = """
import sys, time
from re2tal.training.signals import stop_requests
with stop_requests() as requests:
    print("listening", flush=True)
    if "stuck" in sys.argv:
        __import__("threading").Lock().__enter__(), (lock := __import__("threading").Lock()).acquire()
        lock.acquire()  # the main thread runs no handler of Python's any more: signals only retry this
    while not requests:
        time.sleep(0.01)
print("saved", flush=True)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_handlers_restored(number):
    before = [signal.getsignal(one) for one in (*STOP_SIGNALS, PARENT_IS_GONE)]
    with stop_requests() as requests:
        assert not requests
        signal.raise_signal(number)
        assert requests
        with stop_requests() as inner:
            assert inner is requests
    assert [signal.getsignal(one) for one in (*STOP_SIGNALS, PARENT_IS_GONE)] == before
    assert signal.set_wakeup_fd(-1) == -1


def listening(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


def test_one_signal_lets_the_process_save():
    process = listening()
    process.send_signal(signal.SIGUSR2)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "saved\n")
    assert "SIGUSR2: the run saves and stops" in errors


def test_the_third_signal_ends_a_process_that_is_stuck_and_a_lost_launcher_is_no_signal():
    process = listening("stuck")
    for _ in range(4):
        process.send_signal(PARENT_IS_GONE)
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.3)  # closer together they would be one request
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the third request" in errors


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as requests:
            signal.raise_signal(signal.SIGHUP)
            assert not requests
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_was_forked_meanwhile_and_lives_on_holds_up_nobody():
    """It has a copy of the socket, which would keep the listener waiting."""
    with stop_requests():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    left = child.is_alive()
    child.kill()
    child.join()
    assert left
