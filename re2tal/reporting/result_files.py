"""RESULT_FORMATS: files of detections by the name of their format; one for all videos, or one for each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from re2tal.evaluation.results import write_results
from re2tal.reporting.annotation_files import boris_events, csv_table, eaf
from re2tal.reporting.found import FoundInVideo
from re2tal.reporting.subtitles import srt, webvtt
from re2tal.strict_json import write_atomically
from re2tal.video_ids import MAX_BYTES


@dataclass(frozen=True, slots=True)
class ResultFormat:
    """How detections are written."""

    about: str
    suffix: str
    for_all: Callable[[Iterable[FoundInVideo]], str] | None = None
    """The text of one file for all videos; where both are None, it is `write_results`."""
    for_each: Callable[[FoundInVideo], str] | None = None
    """The text of a video's own file."""
    min_score: float = 0.0
    """Unless the user says otherwise: to look at, a few sure ones serve; to score, all of them."""


LOOKED_AT = 0.3
RESULT_FORMATS: dict[str, ResultFormat] = {
    "json": ResultFormat("ActivityNet's results, for re2tal evaluate", ".json"),
    "csv": ResultFormat("a table", ".csv", for_all=csv_table),
    "srt": ResultFormat("subtitles for players", ".srt", for_each=srt, min_score=LOOKED_AT),
    "vtt": ResultFormat("subtitles for browsers", ".vtt", for_each=webvtt, min_score=LOOKED_AT),
    "eaf": ResultFormat("ELAN", ".eaf", for_each=eaf, min_score=LOOKED_AT),
    "boris": ResultFormat("BORIS' aggregated events", ".tsv", for_all=boris_events, min_score=LOOKED_AT),
}


def choose_format(name: str | None, out: Path | None) -> str:
    """The format that is named, or that of the suffix of `out`; "json" where neither says. ValueError otherwise."""
    if name is not None:
        if name not in RESULT_FORMATS:
            raise ValueError(f"format is {name!r}; known: {', '.join(RESULT_FORMATS)}")
        return name
    if out is None:
        return "json"
    by_suffix = {row.suffix: name for name, row in RESULT_FORMATS.items()}
    if out.suffix.lower() not in by_suffix:
        raise ValueError(
            f"out is {out}, whose suffix says no format; end it in one of {', '.join(by_suffix)}, or give a format: "
            f"{', '.join(RESULT_FORMATS)}"
        )
    return by_suffix[out.suffix.lower()]


@dataclass(slots=True)
class ResultsFile:
    """Where detections go, video by video: a file for all, written again as a whole, or a folder with one for each.

    A format of one file per video may have a file as `out` where there is one video.
    """

    out: Path
    format_name: str
    classes: Sequence[str]
    found: list[FoundInVideo] = field(default_factory=list)
    """What goes into a file for all."""
    num_written: int = 0
    """Detections."""

    def __post_init__(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(self.out.parent, os.W_OK):
            raise ValueError(f"{self.out.parent} cannot be written to; give another place for the results (out)")

    @property
    def is_per_video(self) -> bool:
        """Whether each video has a file of its own."""
        return RESULT_FORMATS[self.format_name].for_each is not None

    def add(self, video: FoundInVideo) -> None:
        """A video's own file is written at once; a file for all by `write`."""
        row = RESULT_FORMATS[self.format_name]
        self.num_written += len(video.detections)
        if row.for_each is None:
            self.found.append(video)
            return
        target = self.out
        if self.out.suffix.lower() != row.suffix:
            target.mkdir(parents=True, exist_ok=True)
            target = target / f"{_file_name(video.name)}{row.suffix}"
        write_atomically(target, row.for_each(video))

    def write(self) -> None:
        """The file for all, with what was added so far."""
        row = RESULT_FORMATS[self.format_name]
        if row.for_all is not None:
            write_atomically(self.out, row.for_all(self.found))
        elif row.for_each is None:
            write_results(self.out, {one.name: one.detections for one in self.found}, self.classes)


def _file_name(name: str) -> str:
    """Of a video's own file: names of videos that are alike have their folders in them, which may be too many."""
    whole = name.replace("/", "%2F")
    if len(whole.encode()) <= MAX_BYTES:
        return whole
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{digest} {whole.encode()[-(MAX_BYTES - 17) :].decode(errors='ignore')}"
