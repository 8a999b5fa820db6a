"""Names the rank that holds up the others, and ends the run: a collective alone would wait, and then blame nobody.

    every rank:  its phase, steps of progress and time spent in one collective -> a store that rank 0 serves
    rank 0:      reads all of them; a rank that is silent, or holds up the others, for too long: a verdict in the store
    every rank:  sees the verdict, or that rank 0 is silent -> stacks into the run folder, and the end

All of it runs in threads: the main one may be in a collective, asleep, or in native code. Nothing compares clocks of
two machines: each rank measures with its own.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from re2tal.distributed import free_port, gather_objects, named_host
from re2tal.training.verdict import PATIENCE, Report, judge

# Several reports long (one every 2 seconds), so that a busy machine is not taken for a dead one.
GONE_SECONDS = 10.0
"""From the moment when a rank's connection closes to the end of the run."""
COMPUTES = 0.02
"""Share of a core above which a process computes, even on a machine that many share."""
STACKS_NAME = "stacks"
GO_ON = "checkpoints are intact, go on with --resume"


class RanksLost(Exception):
    """Another rank of the run is gone; the message names it."""


@dataclass
class Place:
    """Where the main thread is."""

    phase: str = "start-up"
    patient: bool = True
    progress: int = 0
    since: float = field(default_factory=time.monotonic)


_here = Place()


def at(phase: str, *, patient: bool = False) -> None:
    """Says what this rank does from here on. `patient`: that may take long, and longer than on other ranks."""
    global _here
    _here = Place(phase, patient, _here.progress + 1)


@contextmanager
def watched(folder: Path, *, limit_seconds: float, master_addr: str, exit_status: int) -> Iterator[None]:
    """Every rank of a group enters this. Inside, a rank that hangs, is stopped or dies ends the process.

    RanksLost, naming the rank, where a collective fails because another rank is gone; `exit_status` at once where the
    main thread cannot raise, after the stacks of all threads were written to `folder`.
    """
    if dist.get_world_size() == 1:
        with _watched_alone(folder, limit_seconds=limit_seconds, exit_status=exit_status):
            yield
        return
    watchdog = Watchdog(folder, limit_seconds=limit_seconds, master_addr=master_addr, exit_status=exit_status)
    # The watchdog is to speak first: a collective's own timeout names nobody.
    slowest = timedelta(seconds=PATIENCE * limit_seconds + 60.0)
    dist.distributed_c10d._set_pg_timeout(slowest, dist.group.WORLD)
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        # torch has one class for most of its errors: only the words tell a rank that is gone from a fault of this one.
        if not re.search("gloo|NCCL|Connection|closed by peer|reset by peer|TCPStore", str(error)):
            raise
        raise RanksLost(watchdog.lost(error)) from error
    finally:
        watchdog.close()


@contextmanager
def _watched_alone(folder: Path, *, limit_seconds: float, exit_status: int) -> Iterator[None]:
    """Inside, a run of one rank whose main thread makes no progress ends, unless native code keeps the interpreter."""
    # A tenth of the limit at most, so that a short limit, as tests have, is kept too.
    closed, interval = threading.Event(), min(2.0, limit_seconds / 10)
    stay = Stay(limit_seconds, interval)

    def watch() -> None:
        now, used = time.monotonic(), time.process_time()
        while not closed.wait(interval):
            earlier, now = now, time.monotonic()
            before, used = used, time.process_time()
            place = _here  # once: the main thread may move on meanwhile
            if stay.is_too_long(place, now - earlier, used - before):
                _write_stacks(folder, rank=0)
                said = f"no progress for {stay.seconds:.0f} s at {place.phase!r}, and the run ends. Its stacks are in "
                print(f"re2tal: {said}{folder / STACKS_NAME}; {GO_ON}", file=sys.stderr, flush=True)
                if not closed.is_set():
                    os._exit(exit_status)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


def _write_stacks(folder: Path, *, rank: int) -> None:
    """Those of all threads of this process, where the folder can be written."""

    def write() -> None:
        with suppress(OSError):
            stacks = folder / STACKS_NAME
            stacks.mkdir(parents=True, exist_ok=True)
            with (stacks / f"rank-{rank:05d}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    # It may be that very disk that hangs, and nobody else would end the process.
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(timeout=5.0)


class Stay:
    """How long the main thread has been at one place, in `seconds` that count."""

    def __init__(self, limit_seconds: float, interval_seconds: float) -> None:
        """`interval_seconds`: how often somebody looks."""
        self.limit_seconds = limit_seconds
        self.interval_seconds = interval_seconds
        self.seconds = 0.0
        self._place = _here

    def is_too_long(self, place: Place, seconds: float, computed: float) -> bool:
        """Whether it is by now: `seconds` after the last call the thread is at `place`, and the process computed."""
        # A process that was stopped for a while, as by Ctrl-Z, or a machine that slept, hangs no more than it did.
        counted = min(seconds, 2 * self.interval_seconds)
        if place.patient and computed > COMPUTES * seconds:
            counted = 0.0  # the scores of a large evaluation may take any time
        self.seconds = self.seconds + counted if place is self._place else 0.0
        self._place = place
        return self.seconds > self.limit_seconds * (PATIENCE if place.patient else 1)


class Watchdog:
    """The watch of one rank over itself and, on rank 0, over all."""

    def __init__(self, folder: Path, *, limit_seconds: float, master_addr: str, exit_status: int) -> None:
        """Every rank of a group calls this. `folder`: where the stacks go; `exit_status`: of a run that hangs."""
        self.folder = folder
        self.exit_status = exit_status
        self.limit_seconds = limit_seconds
        self.interval_seconds = min(2.0, limit_seconds / 10)
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        hosts = gather_objects((named_host(), free_port() if self.rank == 0 else 0))
        self.hosts = [host for host, _ in hosts]
        self.closed = threading.Event()
        self.contact = time.monotonic()
        self.cut = False
        self._beats: dict[int, tuple[Report, float]] = {}
        self._main = threading.main_thread().ident
        self._collective: tuple[tuple[int, int], float] = ((0, 0), 0.0)
        self._store = dist.TCPStore(
            master_addr,
            hosts[0][1],
            is_master=self.rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(60.0, limit_seconds)),
        )
        # Two, because a call of the store blocks where rank 0 is stopped, and somebody must still see the time pass.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._watch_rank_0)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """To be called when there is nothing more to wait for."""
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()

    def lost(self, error: Exception) -> str:
        """Who is gone, in words: for a rank whose collective failed with `error`."""
        # A dead rank reports no more; one that only failed like this one still does.
        with suppress(dist.DistError, RuntimeError):
            self._read_all()
        deadline = time.monotonic() + GONE_SECONDS
        while time.monotonic() < deadline and not self.cut:
            time.sleep(self.interval_seconds)
        # Whoever lives has reported several times in the seconds just waited.
        quiet = 0.8 * GONE_SECONDS
        if self.cut or time.monotonic() - self.contact > quiet:
            who = f"rank 0 (host {self.hosts[0]})"
        else:
            reports, silent = self._read_all()
            who = ", ".join(
                f"rank {rank} (host {report.host}, at {report.phase!r})"
                for rank, report in enumerate(reports)
                if silent[rank] > quiet
            )
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"{who or 'a rank that cannot be told'} is gone: it was killed or failed, look at its own output "
            f"(seen here as: {first_line[:200]}). Checkpoints are intact; go on with --resume"
        )

    # --------------------------------------------------------------------------------------------------------- threads

    def _exchange(self) -> None:
        try:
            while not self.closed.wait(self.interval_seconds):
                _arm(self.limit_seconds)
                self._store.set(f"beat/{self.rank}", json.dumps([*self._report()]))
                if self.rank == 0 and (verdict := judge(*self._read_all(), limit_seconds=self.limit_seconds)):
                    self._store.set("verdict", verdict)
                if self._store.check(["verdict"]):
                    self._end(self._store.get("verdict").decode())
                self.contact = time.monotonic()
        except (dist.DistError, RuntimeError):  # the store is gone, and rank 0 with it
            self.cut = True

    def _watch_rank_0(self) -> None:
        limit = self.limit_seconds
        while not self.closed.wait(self.interval_seconds):
            silent = time.monotonic() - self.contact
            if silent > (min(GONE_SECONDS, limit) if self.cut else limit) + self.interval_seconds:
                self._end(
                    f"rank 0 (host {self.hosts[0]}) gave no sign of life for {silent:.0f} s: its process is stopped or "
                    "dead, or its machine or network is gone"
                )

    def _report(self) -> tuple[Any, ...]:
        here, now = _here, time.monotonic()
        frame = _collective_frame(sys._current_frames().get(self._main or 0))
        call = (id(frame), here.progress)  # not the frame itself, which would keep its tensors
        if call != self._collective[0]:
            self._collective = (call, now)
        # A millisecond more, because 0 stands for no collective.
        waits = 0.0 if frame is None else now - self._collective[1] + 1e-3
        return named_host(), here.phase, here.patient, here.progress, now - here.since, waits

    def _read_all(self) -> tuple[list[Report], list[float]]:
        """On any rank: the last report of each rank, and how long ago it changed, as seen from here."""
        now = time.monotonic()
        for rank in range(self.num_ranks):
            earlier = self._beats.get(rank, (Report(self.hosts[rank], "start-up", True, 0, 0.0, 0.0), now))
            key = f"beat/{rank}"
            report = Report(*json.loads(self._store.get(key))) if self._store.check([key]) else earlier[0]
            self._beats[rank] = earlier if report == earlier[0] and rank in self._beats else (report, now)
        return [self._beats[rank][0] for rank in range(self.num_ranks)], [
            now - self._beats[rank][1] for rank in range(self.num_ranks)
        ]

    def _end(self, verdict: str) -> None:
        _write_stacks(self.folder, rank=self.rank)
        print(
            f"re2tal (rank {self.rank}): {verdict}. Stacks of the ranks that still answer are in "
            f"{self.folder / STACKS_NAME}. All ranks end; {GO_ON}",
            file=sys.stderr,
            flush=True,
        )
        if self.rank == 0:  # serves the verdict to the others
            time.sleep(2 * self.interval_seconds + 1.0)
        if not self.closed.is_set():
            # Not sys.exit, which ends this thread only: the main one may never return from native code.
            os._exit(self.exit_status)


timer_is_taken = threading.Event()
"""Set by whoever needs faulthandler's only timer for an end of its own."""


def _arm(limit_seconds: float) -> None:
    """Where native code keeps the interpreter, no thread of Python's can end this process: faulthandler does."""
    if not timer_is_taken.is_set():
        faulthandler.dump_traceback_later(PATIENCE * limit_seconds + 60.0, exit=True)


def _collective_frame(frame: FrameType | None) -> FrameType | None:
    """The outermost frame of torch.distributed on a stack; None where it is in no collective."""
    found = None
    while frame is not None:
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            found = frame
        frame = frame.f_back
    return found
