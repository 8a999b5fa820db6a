"""Videos of one shard: each is normalised, checked and described, or rejected with a reason.

A thread hands them over; encoding and checking run in a process of their own, because native code may crash or hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from re2tal.data.building.annotations import duration_tolerance
from re2tal.data.building.encode import Normalised, check_normalised, normalise_video
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.probe import probe_video
from re2tal.data.building.shard_folder import Listed, PackedVideo, ShardPlan
from re2tal.data.contract.manifest import Encoding, Rejection, SourceVideo, StoredVideo
from re2tal.strict_json import sha256_of
from re2tal.structures import VideoRecord

VideoPlan = ShardPlan[Listed]

OnVideo = Callable[[Listed, Rejection | None], None]
"""Called from worker threads after each video."""

LONG_CLIP_SECONDS = 1800.0
"""What a trimmed clip may last at most for the time that it is given, which ends those that hang."""


class Stopped(Exception):
    """The build ends early: another worker failed, or the user stopped it."""


@dataclass(frozen=True, slots=True)
class VideoPacker:
    """One worker: a thread that gives what goes into tars, and a process that encodes."""

    scratch: Path
    encoding: Encoding
    isolated: Isolated
    on_video: OnVideo
    stop: threading.Event

    def run(self, plan: VideoPlan) -> Iterator[PackedVideo | Rejection]:
        """The videos of a shard, in their order; where one cannot be used, why."""
        for record in plan.records:
            if self.stop.is_set():
                raise Stopped
            rejection = None
            try:
                yield self._packed(record, plan.sources.get(record.video_id))
            except ValueError as error:
                rejection = Rejection(video_id=record.video_id, reason=str(error))
                yield rejection
            self.on_video(record, rejection)

    def _packed(self, listed: Listed, source: Path | None) -> PackedVideo:
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
        return PackedVideo(video, target.read_bytes())


def prepare_video(
    source: Path, target: Path, *, encoding: Encoding, expected_seconds: float | None
) -> tuple[SourceVideo, Normalised]:
    """Probe and normalise one file; ValueError where it is no sound video or lasts another time than is expected."""
    probe = probe_video(source)
    seconds = float(probe.duration_seconds)
    if expected_seconds is not None and abs(seconds - expected_seconds) > duration_tolerance(expected_seconds):
        raise ValueError(f"{source} lasts {seconds:.2f} s, the annotation file says {expected_seconds:.2f} s")
    normalised = normalise_video(source, target, probe=probe, encoding=encoding)
    made_from = SourceVideo(
        file=source.name,
        sha256=sha256_of(source),
        codec=probe.codec,
        num_frames=probe.num_frames,
        duration_seconds=seconds,
    )
    return made_from, normalised
