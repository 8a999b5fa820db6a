"""RESULT_FORMATS: files of detections by the name of their format; one for all videos, or one for each."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from re2tal.evaluation.results import Results, read_results, write_results
from re2tal.files import is_stream, write_atomically
from re2tal.reporting.annotation_files import boris_events, csv_table, eaf
from re2tal.reporting.found import FoundInVideo
from re2tal.reporting.subtitles import srt, webvtt
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
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """Weights and options that are at work, as JSON has them; `take_up` wants the same."""
    found: list[FoundInVideo] = field(default_factory=list)
    """What goes into a file for all."""
    num_written: int = 0
    """Detections."""
    spared: Path | None = None
    """The file for all, where another program wrote it meanwhile: it stays, and `out` is another one from there on."""
    _file_bytes: dict[str, int] = field(default_factory=dict)
    """Video -> size of its file, which tells files of one name apart."""
    _written: tuple[int, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        self._written = _mark(self.out)
        if is_stream(self.out):
            return
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            # Tried now, not after hours of detection.
            with TemporaryFile(dir=self.out.parent):
                pass
            if not self.is_per_video and self.out.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except OSError as error:
            raise ValueError(
                f"{self.out} cannot be written: {error.strerror}; give another place for the results (out)"
            ) from None
        if self.format_name == "json" and self.out.is_file():
            with self.out.open("rb") as file:
                # Enough to tell a slip: programs write "results" near the beginning.
                start = file.read(4096)
            if start and b'"results"' not in start:
                raise ValueError(f"{self.out} is there already and holds no results; give another place (out)")

    def take_up(self, files: Mapping[str, Path | None]) -> set[str]:
        """The results that are there already stay; gives the names in `files` that they are of. None is a file that is
        not on this machine.

        ValueError for results of other weights, options or files, and for a format that cannot be read back.
        """
        row = RESULT_FORMATS[self.format_name]
        if row.for_each is not None:
            return {name for name in files if self._own_file(name).is_file()}
        if row.for_all is not None:
            raise ValueError(f"add cannot read {self.format_name} back; give json, srt, vtt or eaf, or leave it out")
        if not self.out.exists():
            return set()
        results = read_results(self.out)
        self._refuse_others(results, files)
        ours = torch.tensor([self.classes.index(one) for one in results.classes], dtype=torch.long)
        for name, one in results.predictions.items():
            one = replace(one, labels=ours[one.labels])
            self.found.append(FoundInVideo(name, None, 0.0, one, tuple(self.classes)))
        return {*files} & {*results.predictions}

    def _refuse_others(self, results: Results, files: Mapping[str, Path | None]) -> None:
        made_with = results.made_with or {}
        for key, value in self.made_with.items():
            if key not in made_with:
                raise ValueError(f"add: {self.out} does not say with which {key} it was made; give another out")
            if made_with[key] != value:
                raise ValueError(
                    f"add: {self.out} was made with {key} {made_with[key]!r}, and here it is {value!r}; use the same, "
                    "give another out, or leave add out"
                )
        if unknown := sorted({*results.classes} - {*self.classes}):
            raise ValueError(f"add: {self.out} has {unknown[0]!r}, which the model does not know; give another out")
        self._file_bytes = dict(sizes) if isinstance(sizes := made_with.get("file_bytes"), dict) else {}
        for name, size in _sizes(files).items():
            if name in results.predictions and self._file_bytes.get(name, size) != size:
                raise ValueError(
                    f"add: {self.out} has results of another file called {name!r}, of {self._file_bytes[name]} bytes, "
                    f"where {files[name]} has {size}; rename one of them, or give another out"
                )

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
        write_atomically(self._own_file(video.name), row.for_each(video))

    def _own_file(self, name: str) -> Path:
        suffix = RESULT_FORMATS[self.format_name].suffix
        return self.out if self.out.suffix.lower() == suffix else self.out / f"{_file_name(name)}{suffix}"

    def save(self) -> None:
        """Writes while more is to come; nothing to a pipe or a device, where a reader gets one document at the end."""
        if not is_stream(self.out):
            self.write()

    def write(self) -> None:
        """The file for all, with what was added so far."""
        if self.is_per_video:
            return
        # Somebody else's file is not overwritten; the rest of this run goes to a new one beside it.
        if (now := _mark(self.out)) is not None and now != self._written:
            self.spared = self.out
            places = (self.out.with_name(f"{self.out.stem}-{number}{self.out.suffix}") for number in count(2))
            self.out = next(one for one in places if not one.exists())
        row = RESULT_FORMATS[self.format_name]
        if row.for_all is not None:
            write_atomically(self.out, row.for_all(self.found))
        else:
            self._file_bytes |= _sizes({one.name: one.path for one in self.found})
            found = {one.name: one.detections for one in self.found}
            made_with = {**self.made_with, "file_bytes": self._file_bytes} if self.made_with else None
            write_results(self.out, found, self.classes, made_with=made_with)
        self._written = _mark(self.out)


def _sizes(files: Mapping[str, Path | None]) -> dict[str, int]:
    return {name: one.stat().st_size for name, one in files.items() if one is not None and one.is_file()}


def _mark(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written; None where there is none, or a stream, which changes by itself."""
    if is_stream(path):
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _file_name(name: str) -> str:
    """Of a video's own file: names of videos that are alike have their folders in them, which may be too many."""
    whole = name.replace("/", "%2F")
    if len(whole.encode()) <= MAX_BYTES:
        return whole
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    # The end of a name tells files apart better than its folders; bytes cut in the middle of a character are dropped.
    return f"{digest} {whole.encode()[-(MAX_BYTES - 17) :].decode(errors='ignore')}"
