"""Videos of one shard: each is normalised, checked and described, or rejected with a reason.

A thread hands them over; encoding and checking run in a process of their own, because native code may crash or hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from re2tal.data.building.annotations import duration_tolerance
from re2tal.data.building.check import Normalised, check_normalised
from re2tal.data.building.encode import normalise_video
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.probe import probe_video
from re2tal.data.building.shard_folder import Listed, PackedVideo, ShardPlan
from re2tal.data.contract.manifest import Encoding, Rejection, SourceVideo, StoredVideo
from re2tal.strict_json import sha256_of
from re2tal.structures import VideoRecord

VideoPlan = ShardPlan[Listed]

OnVideo = Callable[[Listed, Rejection | None], None]
"""Called from worker threads after each video."""

SILENT_SECONDS = 300.0
"""Kill the encoding process after this time without a new frame, whatever the length of the video."""


class Stopped(Exception):
    """The build ends early: another worker failed, or the user stopped it."""


@dataclass(frozen=True, slots=True)
class VideoPacker:
    """One worker: a thread that yields the contents of tars, and a process that encodes."""

    scratch: Path
    encoding: Encoding
    max_damaged: float
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
            raise ValueError("there is no file of this name, or a link that leads nowhere")
        target = self.scratch / "video.mp4"
        expected = listed.duration_seconds if isinstance(listed, VideoRecord) else None
        try:
            made_from, normalised = self.isolated.call(
                SILENT_SECONDS,
                prepare_video,
                source,
                target,
                encoding=self.encoding,
                expected_seconds=expected,
                max_damaged=self.max_damaged,
            )
            self.isolated.call(SILENT_SECONDS, check_normalised, target, normalised)
        except OSError:  # a disk that is full is no fault of the video
            raise
        except Exception as error:  # one video, whatever it does to us, never ends a build
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(what.replace(str(source), source.name).replace(str(target), "as stored")) from None
        record = listed if isinstance(listed, VideoRecord) else listed.lasting(made_from.duration_seconds)
        video = StoredVideo(
            record=record,
            num_frames=normalised.num_frames,
            fps=normalised.fps,
            width=normalised.width,
            height=normalised.height,
            source=made_from,
            damaged_share=normalised.damage.share,
        )
        return PackedVideo(video, target.read_bytes(), str(normalised.damage) if normalised.damage.num_damaged else "")


def prepare_video(
    source: Path, target: Path, *, encoding: Encoding, expected_seconds: float | None, max_damaged: float
) -> tuple[SourceVideo, Normalised]:
    """Probe and normalise one file; ValueError where it is no sound video or lasts another time than is expected."""
    probe = probe_video(source, max_missing=max_damaged)
    seconds = float(probe.duration_seconds)
    if expected_seconds is not None and abs(seconds - expected_seconds) > duration_tolerance(expected_seconds):
        raise ValueError(f"{source} lasts {seconds:.2f} s, the annotation file says {expected_seconds:.2f} s")
    normalised = normalise_video(source, target, probe=probe, encoding=encoding, max_damaged=max_damaged)
    made_from = SourceVideo(
        file=source.name,
        sha256=_sha256_of(source),
        codec=probe.codec,
        num_frames=probe.num_frames,
        duration_seconds=seconds,
    )
    return made_from, normalised


def _sha256_of(source: Path) -> str:
    try:
        return sha256_of(source)
    except OSError as error:
        raise ValueError(f"{source} cannot be read to its end: {error.strerror}; copy it again") from None
