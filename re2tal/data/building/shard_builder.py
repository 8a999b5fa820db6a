"""Build one shard: each video is normalised, checked and described, or rejected with a reason.

A thread writes the tar; encoding and checking run in a process of their own, because native code may crash or hang.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from re2tal.data.building.annotations import duration_tolerance
from re2tal.data.building.clips import TrimmedClip
from re2tal.data.building.encode import Normalised, check_normalised, normalise_video
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.probe import probe_video
from re2tal.data.contract.manifest import (
    Encoding,
    IndexedVideo,
    Rejection,
    ShardFile,
    ShardReport,
    Source,
    StoredVideo,
    to_json,
)
from re2tal.data.contract.shards import Pair, write_tar
from re2tal.strict_json import sha256_of
from re2tal.structures import VideoRecord

Listed = VideoRecord | TrimmedClip
"""A video that is to be packed: with actions in it, or one that is a single action, whose length is not known yet."""

OnVideo = Callable[[Listed, Rejection | None], None]
"""Called from worker threads after each video."""

LONG_CLIP_SECONDS = 1800.0
"""What a trimmed clip may last at most for the time that it is given, which ends those that hang."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The videos that go into one shard."""

    name: str
    records: tuple[Listed, ...]
    sources: dict[str, Path]
    """Files of those records that have one."""
    fingerprint: str


class Stopped(Exception):
    """The build ends early: another worker failed, or the user stopped it."""


@dataclass(frozen=True, slots=True)
class ShardBuilder:
    """One worker: a thread that writes tars, and a process that encodes."""

    folder: Path
    scratch: Path
    encoding: Encoding
    isolated: Isolated
    on_video: OnVideo
    stop: threading.Event

    def build(self, plan: ShardPlan) -> ShardReport:
        """Write the shard's tar, unless no video of it can be used."""
        stored: list[tuple[StoredVideo, int]] = []
        rejected: list[Rejection] = []

        def pairs() -> Iterator[Pair]:
            for record in plan.records:
                if self.stop.is_set():
                    raise Stopped
                rejection = None
                try:
                    video, mp4 = self._stored(record, plan.sources.get(record.video_id))
                except ValueError as error:
                    rejection = Rejection(video_id=record.video_id, reason=str(error))
                    rejected.append(rejection)
                else:
                    stored.append((video, zlib.crc32(mp4)))
                    yield Pair(video_id=record.video_id, json=to_json(video).encode(), content=mp4)
                self.on_video(record, rejection)

        path = self.folder / plan.name
        places = write_tar(path, pairs())
        if not places:
            path.unlink()
        return ShardReport(
            fingerprint=plan.fingerprint,
            file=shard_file(path, num_videos=len(places)) if places else None,
            videos=tuple(
                _indexed(video, crc32, plan.name, place) for (video, crc32), place in zip(stored, places, strict=True)
            ),
            rejected=tuple(rejected),
        )

    def _stored(self, listed: Listed, source: Path | None) -> tuple[StoredVideo, bytes]:
        """Normalise and check one video in the other process; ValueError says why it cannot be used."""
        if source is None:
            raise ValueError("there is no file of this name")
        target = self.scratch / "video.mp4"
        expected = listed.duration_seconds if isinstance(listed, VideoRecord) else None
        seconds = expected or LONG_CLIP_SECONDS
        try:
            made_from, normalised = self.isolated.call(
                300 + 30 * seconds, prepare_video, source, target, encoding=self.encoding, expected_seconds=expected
            )
            self.isolated.call(120 + 2 * seconds, check_normalised, target, normalised)
        except ValueError as error:
            raise ValueError(str(error).replace(str(source), source.name).replace(str(target), "as stored")) from None
        record = listed if isinstance(listed, VideoRecord) else listed.lasting(made_from.duration_seconds)
        video = StoredVideo(
            record=record,
            num_frames=normalised.num_frames,
            fps=normalised.fps,
            width=normalised.width,
            height=normalised.height,
            source=made_from,
        )
        return video, target.read_bytes()


def prepare_video(
    source: Path, target: Path, *, encoding: Encoding, expected_seconds: float | None
) -> tuple[Source, Normalised]:
    """Probe and normalise one file; ValueError where it is no sound video or lasts another time than is expected."""
    probe = probe_video(source)
    seconds = float(probe.duration_seconds)
    if expected_seconds is not None and abs(seconds - expected_seconds) > duration_tolerance(expected_seconds):
        raise ValueError(f"{source} lasts {seconds:.2f} s, the annotation file says {expected_seconds:.2f} s")
    normalised = normalise_video(source, target, probe=probe, encoding=encoding)
    made_from = Source(
        file=source.name,
        sha256=sha256_of(source),
        codec=probe.codec,
        num_frames=probe.num_frames,
        duration_seconds=seconds,
    )
    return made_from, normalised


def _indexed(video: StoredVideo, crc32: int, shard: str, place: tuple[int, int]) -> IndexedVideo:
    return IndexedVideo(
        record=video.record,
        shard=shard,
        offset=place[0],
        num_bytes=place[1],
        num_frames=video.num_frames,
        fps=video.fps,
        width=video.width,
        height=video.height,
        crc32=crc32,
    )


def shard_file(path: Path, *, num_videos: int) -> ShardFile:
    """The entry of a finished tar in the manifest."""
    return ShardFile(name=path.name, num_bytes=path.stat().st_size, sha256=sha256_of(path), videos=num_videos)
