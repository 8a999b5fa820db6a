"""Video files, one after the other, as clips for a detector: decoded once, ahead of the network, and never as a whole.

    process: FFmpeg, pictures at the model's rate -> thread: resized, cut into windows -> a queue of a few clips

Native code that crashes, or falls silent, costs the video that it was at.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

from re2tal.data.addresses.address import Address, Source
from re2tal.data.addresses.shared import local_copy
from re2tal.data.building.encode import sampling_grid
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.pictures import pictures
from re2tal.data.building.probe import MAX_DAMAGED, probe_video
from re2tal.data.streaming.live import LiveClip, live_clips, shaped
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import Trimmed
from re2tal.runs.video_files import PROBE_SECONDS, encoding_for

T = TypeVar("T")

SILENT_SECONDS = 120.0
"""a decoder that gives nothing for so long is stopped, and its video left out"""
# As much as keeps a network busy; each clip of a large model is a hundred megabytes.
CLIPS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Fetching:
    """A video comes from its address."""

    path: Source
    share: float
    """So much of it is here."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A video begins."""

    path: Source
    duration_seconds: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A clip of the video that was opened last."""

    clip: LiveClip


@dataclass(frozen=True, slots=True)
class Closed:
    """A video ends: whole, or left out for a `reason`."""

    path: Source
    reason: str | None = None


Event = Fetching | Opened | Seen | Closed


def watch(files: Iterable[Source], clips: ClipConfig, *, max_damaged: float = MAX_DAMAGED) -> Iterator[Event]:
    """Each file is opened, seen in clips, and closed; one that cannot be used may be closed at any time."""
    return iter(Ahead(_events(files, clips, max_damaged), depth=CLIPS_AHEAD))


def _events(files: Iterable[Source], clips: ClipConfig, max_damaged: float) -> Iterator[Event]:
    with Isolated() as isolated:
        for source in files:
            try:
                if isinstance(source, Path):
                    yield from _events_of(source, source, clips, max_damaged, isolated)
                else:
                    yield from _events_from_afar(source, clips, max_damaged, isolated)
            except (ValueError, OSError) as error:
                yield Closed(source, _without(source, str(error)))
            else:
                yield Closed(source)


def _events_from_afar(address: Address, clips: ClipConfig, max_damaged: float, isolated: Isolated) -> Iterator[Event]:
    with local_copy(address) as copy:
        for share in copy.fetch():
            yield Fetching(address, share)
        try:
            yield from _events_of(copy.path, address, clips, max_damaged, isolated)
        except ValueError as error:
            raise ValueError(_without(copy.path, str(error))) from None


def _events_of(
    path: Path, source: Source, clips: ClipConfig, max_damaged: float, isolated: Isolated
) -> Iterator[Event]:
    windowing, encoding = clips.windowing, encoding_for(clips)
    assert not isinstance(windowing, Trimmed)
    probe = isolated.call(PROBE_SECONDS, probe_video, path, max_missing=max_damaged)
    rate, num_frames = sampling_grid(probe.duration_seconds, encoding)
    duration_seconds = float(probe.duration_seconds)
    yield Opened(source, duration_seconds)
    shown = isolated.iterate(
        SILENT_SECONDS,
        pictures,
        path,
        probe=probe,
        rate=rate,
        num_frames=num_frames,
        short_side=encoding.short_side,
        max_damaged=max_damaged,
    )
    pieces = (shaped(piece, size=clips.size, fit=clips.fit) for piece in shown)
    num_clips = 0
    for clip in live_clips(
        pieces, windowing, frames_per_second=float(rate), video_id=str(source), duration_seconds=duration_seconds
    ):
        num_clips += 1
        yield Seen(clip)
    if not num_clips:
        raise ValueError(f"{path}: no frame of it can be shown; replace the file")


def _without(path: Source, reason: str) -> str:
    """The reason alone, where it begins with the file's name."""
    return reason.removeprefix(f"{path}: ").removeprefix(f"{path} ")


@dataclass(frozen=True, slots=True)
class _Last:
    error: BaseException | None


class Ahead(Generic[T]):
    """Items of an iterator that a thread works on, at most `depth` ahead; it ends when nobody wants more of them."""

    def __init__(self, items: Iterator[T], *, depth: int) -> None:
        self._items = items
        self._depth = depth

    def __iter__(self) -> Iterator[T]:
        queue: Queue[Any] = Queue(maxsize=self._depth)
        unwanted = threading.Event()
        thread = threading.Thread(target=self._work, args=(queue, unwanted), name="re2tal-decode", daemon=True)
        thread.start()
        try:
            while not isinstance(item := _patiently(queue), _Last):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            unwanted.set()
            # The items are closed by their thread: a process must not be stopped by two.
            thread.join()

    def _work(self, queue: Queue[Any], unwanted: threading.Event) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if not _put(queue, item, unwanted):
                    break
        # Raised again where the items are taken: what a thread raises ends nothing.
        except BaseException as raised:
            error = raised
        finally:
            self._items.close()  # type: ignore[attr-defined]
        _put(queue, _Last(error), unwanted)


def _patiently(queue: Queue[Any]) -> Any:
    while True:
        try:
            return queue.get(timeout=1.0)  # Ctrl-C is heard between two waits on every system
        except Empty:
            continue


def _put(queue: Queue[Any], item: Any, unwanted: threading.Event) -> bool:
    """Whether the item was taken."""
    while not unwanted.is_set():
        try:
            # Not without a limit: nobody may take the item any more.
            queue.put(item, timeout=0.2)
        except Full:
            continue
        return True
    return False
