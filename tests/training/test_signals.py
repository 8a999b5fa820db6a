"""What asks a run to stop is noted; who presses Ctrl-C twice does not want to wait."""

from __future__ import annotations

import os
import signal

import pytest

from re2tal.training.signals import stop_requests


def test_signals_are_noted_and_the_handlers_restored():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with stop_requests() as requests:
        for number in numbers:
            os.kill(os.getpid(), number)
        assert requests == list(numbers)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_interrupt_from_the_keyboard_does_not_wait():
    with stop_requests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(requests) == 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
