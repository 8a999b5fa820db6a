"""One video: normalised, or copied where it is sound as it is, checked and described, or refused with a reason.

A thread asks for it; encoding and checking run in a process of their own, because native code may crash or hang.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from re2tal.data.building.annotation_entries import misfit
from re2tal.data.building.check import MAX_DIFFERENCE, Normalised, check_normalised
from re2tal.data.building.copy_video import COPY_DIFFERENCE, check_as_it_is, mp4_of
from re2tal.data.building.encode import normalise_video
from re2tal.data.building.isolated import Isolated, IsolationError
from re2tal.data.building.make_videos import Made
from re2tal.data.building.probe import probe_video
from re2tal.data.building.shard_folder import Listed
from re2tal.data.contract.manifest import Encoding, SourceVideo, StoredVideo
from re2tal.strict_json import sha256_of
from re2tal.structures import VideoRecord

# None: what `encode` says of a full disk in words has no number.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, None)
SILENT_SECONDS = 300.0
"""Kill the encoding process after this time without a new frame, whatever the length of the video."""


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


def prepare_video(
    source: Path, target: Path, *, encoding: Encoding | None, expected_seconds: float | None, max_damaged: float
) -> tuple[SourceVideo, Normalised]:
    """Probe one file and normalise it, or copy it where there is no encoding; ValueError where it is no sound video,
    lasts another time than is expected, or cannot be copied."""
    probe = probe_video(source, max_missing=max_damaged)
    seconds = float(probe.duration_seconds)
    if expected_seconds is not None and (why := misfit(seconds, expected_seconds)):
        raise ValueError(f"{source}: {why}")
    if encoding is None:
        mp4 = mp4_of(source, probe=probe)
        normalised = check_as_it_is(source, mp4, probe=probe)
        if source != target:
            target.write_bytes(mp4.content)
    else:
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
