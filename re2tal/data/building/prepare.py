"""What a process of its own does with one video: probes it, and normalises it or copies it.

Nothing here imports torch or WebDataset: the process starts in a second, and there is one for each worker.
"""

from __future__ import annotations

from pathlib import Path

from re2tal.data.building.annotation_entries import misfit
from re2tal.data.building.check import Normalised
from re2tal.data.building.copy_video import check_as_it_is, mp4_of
from re2tal.data.building.encode import normalise_video
from re2tal.data.building.probe import probe_video
from re2tal.data.contract.manifest import Encoding, SourceVideo
from re2tal.files import sha256_of


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
