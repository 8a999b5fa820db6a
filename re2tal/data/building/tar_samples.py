"""The samples of plain WebDataset tars (key.mp4 beside key.json, .txt or .cls): headers and labels, read in place."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from re2tal.data.building.clips import ClipList, TrimmedClip
from re2tal.data.building.labels import OR_FIX, Classes, fold_notes, is_label, one_spelling, twin_problems
from re2tal.data.building.named_files import walk
from re2tal.video_ids import VIDEO_SUFFIXES, id_fault

MAX_LABEL_BYTES = 1 << 20
LABELS = ("json", "cls", "txt")
"""Suffixes of the members that may say what a video shows, or what it is called."""
_ID_KEYS = ("video_id", "videoid", "id", "key")
_LABEL_KEYS = ("label", "class", "class_name", "category")


@dataclass(slots=True)
class Sample:
    """The members of one key."""

    tar: Path
    key: str
    videos: dict[str, tuple[int, int]] = field(default_factory=dict)
    """suffix -> (offset, bytes) in the tar"""
    labels: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""
    """Why none of its members can be used."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the video may be called in an annotation file: its key, that without v_, and what its .json says."""
        said, stem = self._json(), Path(self.key).name
        urls = (str(said.get(key, "")).rsplit("/", 1)[-1].rpartition("v=")[2] for key in ("url", "path", "filename"))
        others = [unquote(stem), *(str(said[key]) for key in _ID_KEYS if isinstance(said.get(key), str | int))]
        return (stem, stem.removeprefix("v_"), *others, *(Path(url).stem for url in urls if url))

    def label(self) -> str:
        """What its .json, .cls or .txt says it shows, as it is written; ValueError where nothing says it."""
        said = self._json()
        texts = (self.labels[kind].decode("utf-8", "replace") for kind in ("cls", "txt") if kind in self.labels)
        found = next((said[key] for key in _LABEL_KEYS if said.get(key) is not None), next(texts, ""))
        label = str(found).strip()
        if isinstance(found, bool) or not isinstance(found, str | int) or not is_label(label):
            raise ValueError(
                f"its label is {found!r:.100}; wanted a class of 1 to 200 printable characters in its .cls, .txt, or "
                ".json ('label')"
            )
        return label

    def _json(self) -> dict[str, Any]:
        try:
            said = json.loads(self.labels.get("json", b"{}"))
        except (ValueError, RecursionError):
            return {}
        return said if isinstance(said, dict) else {}


def read_samples(folder: Path) -> tuple[list[Sample], list[str]]:
    """(samples of all tars below a folder, a sentence for each place that cannot be read); reads headers and labels."""
    unread: list[str] = []
    tars = [folder] if folder.is_file() else _tars(folder, unread)
    if not tars:
        raise ValueError(f"{folder} holds no .tar; give the folder of a WebDataset")
    samples: dict[tuple[Path, str], Sample] = {}
    for path in tars:
        try:
            # "r:" takes plain tars alone: members of compressed ones have no place to read from.
            with tarfile.open(path, "r:") as tar, path.open("rb") as file:
                for member in tar:
                    _add_member(samples, path, member, file)
        except Exception as error:  # one tar, whatever it does to its reader, never ends a job
            unread.append(f"{path} cannot be read to its end: {error}")
    return [sample for sample in samples.values() if sample.videos or sample.fault], unread


def _tars(folder: Path, unread: list[str]) -> list[Path]:
    named = (root / name for root, _, names in walk(folder, unread) for name in names if name.lower().endswith(".tar"))
    return sorted(path for path in named if path.is_file())


def _add_member(samples: dict[tuple[Path, str], Sample], path: Path, member: tarfile.TarInfo, file: Any) -> None:
    """As webdataset splits names: the key ends at the first dot of the file's name."""
    parent, slash, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    suffix = suffix.lower()
    is_video = f".{suffix}" in VIDEO_SUFFIXES
    if not stem or not (is_video or suffix in LABELS):
        return
    sample = samples.setdefault((path, parent + slash + stem), Sample(path, parent + slash + stem))
    if suffix in sample.videos or suffix in sample.labels:
        sample.fault = f"its tar holds {suffix} of this key twice"
    # A sparse member of two kilobytes could unfold to gigabytes.
    elif not member.isreg() or member.issparse():
        sample.fault = f"its {suffix} is no plain file (type {member.type!r})"
    elif is_video:
        sample.videos[suffix] = member.offset_data, member.size
    elif member.size <= MAX_LABEL_BYTES:
        file.seek(member.offset_data)
        sample.labels[suffix] = file.read(member.size)


def list_clips(
    samples: Iterable[Sample], *, subset: str, classes: Sequence[str] | None, fix_labels: bool = False
) -> tuple[ClipList, list[str]]:
    """(trimmed clips that name their class, samples that do not); an id that two samples have is there once.

    ValueError for labels that differ by case, space or Unicode form, unless `fix_labels` reads them as one.
    """
    labels: list[tuple[Sample, str]] = []
    left_out = []
    for sample in samples:
        try:
            if fault := id_fault(Path(sample.key).name):
                raise ValueError(f"its key is no id: {fault}")
            labels.append((sample, sample.label()))
        except ValueError as error:
            left_out.append(f"{sample.tar.name} {sample.key}: {error}")
    replaced = one_spelling((label for _, label in labels), classes=classes or ()) if fix_labels else {}
    labels = [(sample, replaced.get(label, label)) for sample, label in labels]
    names = Classes((label for _, label in labels), classes)
    clips: dict[str, TrimmedClip] = {}
    for sample, label in labels:
        try:
            name = Path(sample.key).name
            clips.setdefault(name, TrimmedClip(name, subset, names.name(label)))
        except ValueError as error:
            left_out.append(f"{sample.tar.name} {sample.key}: {error}")
    if twins := twin_problems((clip.label for clip in clips.values()), ", give --classes FILE" + OR_FIX):
        raise ValueError("; ".join(twins[:20]))
    if not clips:
        raise ValueError(f"no sample can be used: {left_out[:1]}; give --annotations, or labels in .cls, .txt or .json")
    found = tuple(sorted({clip.label for clip in clips.values()})) if classes is None else tuple(classes)
    notes = tuple(fold_notes(replaced))
    return ClipList(subsets={subset: tuple(clips.values())}, classes=found, paths={}, notes=notes), left_out
