"""Worker processes of a stream: which signals end them, what is done about lost ones, and the memory they need."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

HAS_MASKS = hasattr(signal, "pthread_sigmask") and hasattr(signal, "sigwaitinfo")
"""Windows and macOS lack the one or the other; there, workers end as soon as they are told to."""
# The list of training/signals.py, written again: data does not import training.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
)
"""What schedulers, and Ctrl-C, send to every process of a job that has to end. The trainer needs its workers a little
longer then, to reach the step after which all ranks save."""


def start_method() -> str:
    """How worker processes begin; macOS has forks too, but its libraries do not bear them."""
    # A forked child must not touch CUDA, and one that exists already could be touched by mistake.
    return "fork" if sys.platform == "linux" and not torch.cuda.is_initialized() else "spawn"


def start_worker(worker: int) -> None:
    """What a worker process does first."""
    # What is garbage of the parent stays that: to free a scaler of FFmpeg, the worker would wait, for ever, for threads
    # that only the parent has.
    gc.freeze()
    gc.enable()
    heed_only_the_parent()


def heed_only_the_parent() -> None:
    """From then on the signals of STOP_SIGNALS end this process only where its parent sent them."""
    if not HAS_MASKS:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # A thread and no handler: Python's handlers run only between two of its instructions, which a decoder may not
    # reach.
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(parent: int) -> None:
    # Not simply ignored: multiprocessing ends a worker that hangs by SIGTERM, and then waits for its end.
    # A scheduler signals every process of the job. The parent alone knows whether the run still needs this one.
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    # sys.exit would end this thread alone, and atexit belongs to the parent.
    os._exit(0)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block them in this context. A process started here inherits that in all its threads, also in those that libraries
    start on import, before `heed_only_the_parent` is called."""
    if not HAS_MASKS:
        yield
        return
    ensure_running()  # multiprocessing's resource tracker: to start it inside would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def no_collections() -> Iterator[None]:
    """No garbage is collected inside, nor in a process that is forked there until it calls `start_worker`."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# How often a process that waits for a batch looks at its workers. torch's own 5 seconds would add to every loss.
POLL_SECONDS = 1.0
# A worker that only decodes ends within one clip; whoever takes longer hangs.
EXIT_SECONDS = 5.0
_started: WeakSet[BaseProcess] = WeakSet()


@atexit.register
def _end_workers() -> None:
    # multiprocessing sends SIGTERM and waits without a limit: for ever, where a worker is stopped or hangs in C.
    running = [worker for worker in _started if worker.is_alive()]
    for worker in running:
        # All are told before one is waited for: they end side by side.
        worker.terminate()
    deadline = time.monotonic() + EXIT_SECONDS
    for worker in running:
        worker.join(max(0.0, deadline - time.monotonic()))
        # SIGKILL also ends what is stopped (Ctrl-Z) or in native code, and does nothing to a process that has ended.
        worker.kill()


class PatientLoader(DataLoader[Any]):
    """A DataLoader that raises RuntimeError where a worker died, only while it is asked for a batch, and that ends a
    worker which owes a batch for `silent_seconds` (0: no limit)."""

    silent_seconds: float = 0.0

    def _get_iterator(self) -> _BaseDataLoaderIter:
        # torch has no public hook for another iterator.
        return _PatientIterator(self) if self.num_workers else super()._get_iterator()

    @property
    def workers(self) -> list[BaseProcess]:
        """Those of the epoch that runs, in the order of their ids."""
        return list(self._iterator._workers) if isinstance(self._iterator, _PatientIterator) else []


class _PatientIterator(_MultiProcessingDataLoaderIter):
    def __init__(self, loader: PatientLoader) -> None:
        self._silent_seconds = loader.silent_seconds
        self._asked = time.monotonic()
        super().__init__(loader)
        _started.update(self._workers)
        # Else a signal handler raises for a dead worker wherever the training is at that moment.
        signal_handling._remove_worker_pids(id(self))
        self._worker_pids_set = False

    def _get_data(self) -> Any:
        # Counted from the question: a worker that is ahead, with full queues, is silent too, and healthy.
        self._asked = time.monotonic()
        return super()._get_data()

    def _try_get_data(self, timeout: float = POLL_SECONDS) -> tuple[bool, Any]:
        found = super()._try_get_data(timeout=timeout)
        if not found[0] and 0 < self._silent_seconds < time.monotonic() - self._asked:
            # torch notes who makes which batch. Where it does not know, any of them may be the one.
            owing = self._task_info.get(self._rcvd_idx)
            for worker in self._workers if owing is None else [self._workers[owing[0]]]:
                # Not asked to end, as it may hang in native code. torch's next look finds it dead, and raises.
                worker.kill()
                worker.join()
        return found


def check_shared_memory(batch_bytes: int, *, workers: int, prefetch: int, ranks: int = 1) -> None:
    """Workers hand batches over in /dev/shm; where it is too small, as in many containers, they die of bus errors.

    `ranks`: so many on this host share it.
    """
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    # One more than is prefetched: the batch that is being made.
    needed = ranks * workers * (prefetch + 1) * batch_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        shared = f" of each of {ranks} ranks on this host" if ranks > 1 else ""
        raise ValueError(
            f"{folder} has {free >> 20} MiB free, {workers} workers{shared} with {prefetch} batches of "
            f"{batch_bytes >> 20} MiB each need {needed >> 20} MiB; enlarge it (docker run --shm-size=...), or "
            "lower data.clips.workers or data.clips.prefetch"
        )
