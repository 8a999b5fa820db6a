"""Make the videos of many shards at once: workers take them one by one, whichever shards they belong to."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import av

from re2tal.data.building.isolated import Isolated
from re2tal.data.building.shard_folder import Listed
from re2tal.data.building.shard_plan import Group, Item, Refused
from re2tal.data.contract.manifest import Rejection, StoredVideo

SCRATCH = ".encoded-"
"""How the folder of what is made begins, inside the shard folder: a killed build leaves it."""


class Stopped(Exception):
    """The build ends early: another worker failed, or the user stopped it."""


@dataclass(frozen=True, slots=True)
class Made:
    """A video that was made, and lies in a file."""

    description: StoredVideo
    seconds: float
    """How long its source lasts."""
    damage: str = ""
    """What is wrong with its source, in words."""
    is_copy: bool = False


Make = Callable[[Listed, Path, Isolated], Made]
"""Makes a video and writes it to a path, in a process that may die; ValueError says why it cannot be used."""

OnVideo = Callable[[Listed, Rejection | None], None]
"""Called from worker threads after each video."""

Result = tuple[Item, Made | Refused, Path]
"""A video, what became of it, and the file that it lies in."""


@dataclass(slots=True)
class _Bench:
    """A group on its way."""

    group: Group
    items: list[Item]
    results: dict[int, Result] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Workshop:
    """All workers take videos from one row, whatever shards these go into; whoever ends a group writes its shard."""

    root: Path
    """Where what is made lies until its shard is written."""
    workers: int
    write: Callable[[Group, Sequence[Result]], None]
    items: Sequence[Item]
    make: Make
    on_video: OnVideo
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, groups: Sequence[Group]) -> None:
        """Make the groups; raises what ended a worker."""
        row: queue.SimpleQueue[tuple[_Bench, int]] = queue.SimpleQueue()
        by_key = {(item.video_id, item.fingerprint): item for item in self.items}
        for group in groups:
            keys = ((one.video_id, one.fingerprint) for one in group.videos)
            bench = _Bench(group, [by_key[key] for key in keys if key in by_key])
            for place in range(len(bench.items)):
                row.put((bench, place))
        num_workers = min(self.workers, row.qsize())
        with (
            tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.root) as scratch,
            ThreadPoolExecutor(num_workers) as pool,
        ):
            futures = [pool.submit(self._work, row, Path(scratch)) for _ in range(num_workers)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self.stop.set()  # an error or Ctrl-C ends the other workers after their current video
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):  # what stopped them comes first
            raise error

    def _work(self, row: queue.SimpleQueue[tuple[_Bench, int]], scratch: Path) -> None:
        with Isolated() as isolated:
            while True:
                try:
                    bench, place = row.get_nowait()
                except queue.Empty:
                    return
                if self.stop.is_set():
                    raise Stopped
                item = bench.items[place]
                path = scratch / f"{bench.group.name}.{place}.mp4"
                result = self._one(item, path, isolated)
                with self.lock:
                    bench.results[place] = item, result, path
                    # Inside the lock, so that exactly one worker sees the last result and writes the shard.
                    is_whole = len(bench.results) == len(bench.items)
                if is_whole:
                    # In the order of the plan, not in that of their making: the bytes do not depend on the workers.
                    self.write(bench.group, [bench.results[number] for number in range(len(bench.items))])
                    for _, _, made in bench.results.values():
                        # At once: a build keeps no more than the shards in work twice on the disk.
                        made.unlink(missing_ok=True)

    def _one(self, item: Item, path: Path, isolated: Isolated) -> Made | Refused:
        result: Made | Refused
        rejection = None
        try:
            result = self.make(item.listed, path, isolated)
        except ValueError as error:
            rejection = Rejection(item.video_id, str(error))
            result = Refused(item.video_id, item.fingerprint, item.terms, rejection.reason)
            path.unlink(missing_ok=True)
        self.on_video(item.listed, rejection)
        return result


def tools() -> dict[str, str]:
    """Versions of what encodes."""
    return {"av": av.__version__, **{k: ".".join(map(str, v)) for k, v in sorted(av.library_versions.items())}}
