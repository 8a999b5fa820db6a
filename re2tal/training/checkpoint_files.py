"""The files of DeepSpeed's checkpoints: written through to the disk, and read without executing anything."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeVar

import torch

from re2tal.distributed import is_main
from re2tal.training.deepspeed_import import (
    DynamicLossScaler,
    LossScaler,
    TorchCheckpointEngine,
    ZeroStageEnum,
    fragment_address,
)

Value = TypeVar("Value")

PAUSES_SECONDS = (2.0, 10.0)
"""Before a write that failed is tried again, and once more."""


class DurableCheckpointEngine(TorchCheckpointEngine):
    """Writes what DeepSpeed saves through to the disk, and reads it without executing anything.

    DeepSpeed itself loads with `weights_only=False`, which runs whatever a tampered file says. Its files need four
    plain classes and no more.
    """

    SAFE_CLASSES = (LossScaler, DynamicLossScaler, fragment_address, ZeroStageEnum, OrderedDict)

    def __init__(self) -> None:
        super().__init__()
        self._failures: list[OSError] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Writes and flushes one file.

        A failure is kept for `take_failures`: DeepSpeed has barriers behind this point, and the other ranks would wait
        in them for one that raised here.
        """
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                flush(file)
        # torch's writer raises a RuntimeError where the disk is full.
        except (OSError, RuntimeError) as error:
            self._failures.append(OSError(f"{path}: {error}"))

    def take_failures(self) -> list[OSError]:
        """The errors of `save` since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one file. ValueError if it holds an object of any other class, or is no such file at all."""
        try:
            with torch.serialization.safe_globals([*self.SAFE_CLASSES]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} is not a checkpoint of this program, or was tampered with: it holds something other than "
                f"tensors and plain values, and nothing of it was executed ({str(error).strip().splitlines()[0]})"
            ) from None


def with_retries(write: Callable[[], Value], *, pauses_seconds: Sequence[float] = PAUSES_SECONDS) -> Value:
    """What `write` returns. After an OSError it is tried again, after each pause in turn; then the error says what to
    do: the disk may have been full, or away, for a moment only."""
    for pause in (*pauses_seconds, None):
        try:
            return write()
        except OSError as error:
            if pause is None:
                raise OSError(
                    f"{error}. Earlier checkpoints are intact; free space or make the folder writable, then resume the "
                    "run"
                ) from None
            if is_main():
                print(f"{error}; trying again in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AssertionError


def flush(file: IO[Any]) -> None:
    """Returns when what was written to `file` is on the disk."""
    file.flush()
    # Without it a rename may reach the disk before the content, and a power cut leaves a complete name on an empty
    # file.
    os.fsync(file.fileno())
