"""One video: normalised, or copied where it is sound as it is, checked and described, or refused with a reason.

A thread asks for it; encoding and checking run in a process of their own, because native code may crash or hang.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from re2tal.data.building.annotation_entries import UNKNOWN_SECONDS
from re2tal.data.building.check import MAX_DIFFERENCE, check_normalised
from re2tal.data.building.copy_video import COPY_DIFFERENCE
from re2tal.data.building.isolated import Isolated, IsolatedPool, IsolationError
from re2tal.data.building.make_videos import Made
from re2tal.data.building.prepare import prepare_video
from re2tal.data.building.probe import probe_video
from re2tal.data.building.shard_folder import Listed
from re2tal.data.contract.manifest import Encoding, StoredVideo
from re2tal.structures import VideoRecord

# None: what `encode` says of a full disk in words has no number.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, None)
SILENT_SECONDS = 300.0
"""Kill the encoding process after this time without a new frame, whatever the length of the video."""


def seconds_of(source: Path | None, isolated: Isolated | IsolatedPool) -> float:
    """How long a video lasts; UNKNOWN_SECONDS of one without a sound file, which a build leaves out."""
    if source is None:
        return UNKNOWN_SECONDS
    try:
        return float(isolated.call(SILENT_SECONDS, probe_video, source).duration_seconds)
    except (ValueError, OSError):
        return UNKNOWN_SECONDS


@dataclass(frozen=True, slots=True)
class VideoPacker:
    """Makes the stored file of a video from its source."""

    sources: Mapping[str, Path]
    """By video id."""
    encoding: Encoding
    max_damaged: float
    copy: bool
    """Whether files that are sound as they are, are copied."""
    encoded: list[str] = field(default_factory=list)
    """With `copy`: the videos that were encoded, and why, a sentence each."""

    def make(self, listed: Listed, target: Path, isolated: Isolated) -> Made:
        """Write one video to `target` and check it; ValueError says why it cannot be used."""
        source = self.sources[listed.video_id]
        if self.copy:
            try:
                return self._made(listed, source, target, isolated, copy=True)
            # Copying is a wish: what cannot be copied is encoded, and the reason told.
            except ValueError as error:
                why = str(error)
        made = self._made(listed, source, target, isolated, copy=False)
        if self.copy:
            self.encoded.append(f"encoded {listed.video_id}: {why}")
        return made

    def _made(self, listed: Listed, source: Path, target: Path, isolated: Isolated, *, copy: bool) -> Made:
        expected = listed.duration_seconds if isinstance(listed, VideoRecord) else None
        with one_video({str(source): source.name, str(target): "as stored"}):
            made_from, normalised = isolated.call(
                SILENT_SECONDS,
                prepare_video,
                source,
                target,
                encoding=None if copy else self.encoding,
                expected_seconds=expected,
                max_damaged=self.max_damaged,
            )
            difference = COPY_DIFFERENCE if copy else MAX_DIFFERENCE
            isolated.call(SILENT_SECONDS, check_normalised, target, normalised, max_difference=difference)
        description = StoredVideo(
            num_frames=normalised.num_frames,
            fps=normalised.fps,
            width=normalised.width,
            height=normalised.height,
            source=made_from,
            damaged_share=normalised.damage.share,
        )
        return Made(description, made_from.duration_seconds, str(normalised.damage), is_copy=copy)


@contextmanager
def one_video(names: Mapping[str, str]) -> Iterator[None]:
    """Whatever a video does to its process is a ValueError about it, which never ends a job; a full disk does.

    `names`: path -> what the message says instead of it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        if isinstance(error, IsolationError):  # the system may have killed it for memory
            what += "; to have it tried again, touch its file"
        for path, name in names.items():
            what = what.replace(path, name)
        raise ValueError(what) from None
