"""Plain WebDataset tars (key.mp4 beside key.json, .txt or .cls) into a shard folder, without encoding anything.

    headers of the tars -> samples -> (a video at a time) tables, then pictures in a process of its own -> shards

Only videos whose frames decord numbers right are taken, byte by byte; the others are left out, and the manifest says
why. Members that are no video and no label are ignored.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from re2tal.data.building.annotations import Annotations
from re2tal.data.building.check import check_normalised
from re2tal.data.building.clips import Classes, ClipList, TrimmedClip
from re2tal.data.building.content import content_id
from re2tal.data.building.copy_video import COPY_DIFFERENCE
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.labels import OR_FIX, fold_notes, is_label, one_spelling, twin_problems
from re2tal.data.building.pack_videos import SILENT_SECONDS, prepare_video
from re2tal.data.building.probe import VIDEO_SUFFIXES
from re2tal.data.building.shard_folder import BuiltSubset, Listed, fingerprint
from re2tal.data.building.shard_plan import Item
from re2tal.data.building.video_folder import Made, VideoFolder, misfit
from re2tal.data.contract.manifest import (
    MANIFEST_NAME,
    VIDEO_ID,
    Encoding,
    FramesPerSecond,
    Manifest,
    StoredVideo,
    read_manifest,
)
from re2tal.data.contract.mp4 import read_mp4
from re2tal.structures import VideoRecord

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
        said = self._json()
        urls = (str(said.get(key, "")).rsplit("/", 1)[-1].rpartition("v=")[2] for key in ("url", "path", "filename"))
        others = [str(said[key]) for key in _ID_KEYS if isinstance(said.get(key), str | int)]
        stem = Path(self.key).name
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
    """(samples of all tars below a folder, tars that cannot be read to their end and why); reads headers and labels."""
    tars = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*.tar") if path.is_file())
    if not tars:
        raise ValueError(f"{folder} holds no .tar; give the folder of a WebDataset")
    samples: dict[tuple[Path, str], Sample] = {}
    broken = []
    for path in tars:
        try:
            with tarfile.open(path, "r:") as tar, path.open("rb") as file:
                for member in tar:
                    _add_member(samples, path, member, file)
        except (tarfile.TarError, OSError) as error:
            broken.append(f"{path}: {error}")
    return [sample for sample in samples.values() if sample.videos or sample.fault], broken


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
            if not VIDEO_ID.fullmatch(Path(sample.key).name):
                raise ValueError("its key is not 1 to 80 of A-Z a-z 0-9 _ -")
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


@dataclass(frozen=True, slots=True)
class Matches:
    """Which sample each listed video is."""

    found: dict[str, Sample]
    """By video id."""
    faults: dict[str, str]
    """Video id -> why no sample is taken for it, though some are called so."""


def match_samples(listed: Annotations | ClipList, samples: Sequence[Sample]) -> Matches:
    """Match the videos of all subsets with samples: by key, else by the key without v_, else by what a .json says.

    No sample becomes two videos, and no video is chosen among two samples.
    """
    wanted = {record.video_id for records in listed.subsets.values() for record in records}
    by_key: dict[str, list[Sample]] = {}
    by_short_key: dict[str, list[Sample]] = {}
    by_json: dict[str, list[Sample]] = {}
    for sample in samples:
        key, short_key, *said = sample.names
        for calls, names in ((by_key, {key}), (by_short_key, {short_key}), (by_json, set(said))):
            for name in names & wanted:
                calls.setdefault(name, []).append(sample)
    found: dict[str, Sample] = {}
    faults: dict[str, str] = {}
    owners: dict[int, str] = {}  # id() of a sample -> the video that it is
    for calls in (by_key, by_short_key, by_json):
        claims: dict[int, list[str]] = {}
        for name in sorted(calls.keys() - found.keys() - faults.keys()):
            free = [sample for sample in calls[name] if id(sample) not in owners]
            if len(free) == 1:
                found[name] = free[0]
            elif free:
                faults[name] = f"{len(free)} samples are called so: {_places(free)}; keep one"
            else:
                (taken, *_) = calls[name]
                faults[name] = f"its sample, {_places([taken])}, is video {owners[id(taken)]!r} already"
            for sample in free:
                claims.setdefault(id(sample), []).append(name)
        for claimed in claims.values():
            for name in claimed if len(claimed) > 1 else ():
                if name in found:
                    others = ", ".join(one for one in claimed if one != name)
                    faults[name] = f"its sample, {_places([found.pop(name)])}, is also called {others}"
        owners |= {sample: claimed[0] for sample, claimed in claims.items()}
    return Matches(found, faults)


def _places(samples: Sequence[Sample]) -> str:
    shown = ", ".join(f"{sample.tar.name} {sample.key}" for sample in samples[:4])
    return shown + (", ..." if len(samples) > 4 else "")


def index_tars(
    listed: Annotations | ClipList, matches: Matches, *, out: Path, subset: str, dataset: str, shard_bytes: int
) -> BuiltSubset:
    """Write `out/subset` from the samples of the videos that are listed; ValueError where no video can be used."""
    records: list[Listed] = list(listed.subset(subset))
    subset = records[0].subset
    folder = VideoFolder(
        out / subset,
        subset,
        settings={"dataset": dataset, "encoding": _encoding(out / subset, records, matches)},
        classes=listed.classes,
        shard_bytes=shard_bytes,
        kind="shards index",
        workers=len(os.sched_getaffinity(0)),
    )
    return folder.build([_item(record, matches) for record in records], partial(_made, matches))


def _item(listed: Listed, matches: Matches) -> Item:
    """What tells the video of a sample from others: its bytes, wherever they are."""
    sample = matches.found.get(listed.video_id)
    if sample is None:
        return Item(listed, "", fault=matches.faults.get(listed.video_id, "no sample of the tars has this name"))
    try:
        offset, size = _place(sample)
        mark = fingerprint("index 2", content_id(sample.tar, offset=offset, num_bytes=size))
    except (ValueError, OSError) as error:
        return Item(listed, "", fault=f"{sample.tar.name} {sample.key}: {error}")
    seconds = f"{listed.duration_seconds} s" if isinstance(listed, VideoRecord) else ""
    return Item(listed, mark, size, terms=seconds)


def _made(matches: Matches, listed: Listed, target: Path, isolated: Isolated) -> Made:
    sample = matches.found[listed.video_id]
    try:
        return _made_one(listed, sample, target, isolated)
    except ValueError as error:
        raise ValueError(f"{sample.tar.name} {sample.key}: {str(error).replace(str(target), 'its video')}") from None


def _made_one(listed: Listed, sample: Sample, target: Path, isolated: Isolated) -> Made:
    content = _content(sample)
    mp4 = read_mp4(content)
    seconds = mp4.num_frames / mp4.fps
    if isinstance(listed, VideoRecord) and (why := misfit(seconds, listed.duration_seconds)):
        raise ValueError(why)
    target.write_bytes(content)
    made_from, checked = isolated.call(
        SILENT_SECONDS, prepare_video, target, target, encoding=None, expected_seconds=None, max_damaged=0.0
    )
    isolated.call(SILENT_SECONDS, check_normalised, target, checked, max_difference=COPY_DIFFERENCE)
    source = replace(made_from, file=f"{sample.tar.name}/{sample.key}")
    return Made(StoredVideo(mp4.num_frames, mp4.fps, mp4.width, mp4.height, source), seconds, is_copy=True)


def _place(sample: Sample) -> tuple[int, int]:
    """(offset, bytes) of the video in the tar."""
    if sample.fault:
        raise ValueError(sample.fault)
    if len(sample.videos) != 1:
        raise ValueError(f"it has {len(sample.videos)} videos ({', '.join(sample.videos)}); one is wanted")
    (place,) = sample.videos.values()
    return place


def _content(sample: Sample) -> bytes:
    offset, size = _place(sample)
    with sample.tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _encoding(folder: Path, records: Sequence[Listed], matches: Matches) -> Encoding:
    """What the manifest says of rate and size, which may differ from video to video; else that of the first."""
    if (folder / MANIFEST_NAME).is_file():
        return read_manifest(folder / MANIFEST_NAME, Manifest).encoding
    found = {record.video_id: matches.found[record.video_id] for record in records if record.video_id in matches.found}
    problems = [f"{one.video_id}: {matches.faults[one.video_id]}" for one in records if one.video_id in matches.faults]
    return _first_encoding(found, problems)


def _first_encoding(found: Mapping[str, Sample], problems: Sequence[str]) -> Encoding:
    """Rate and size of the first video that can be used: they may differ from video to video. `problems` are those of
    videos for which no sample is taken."""
    reason = problems[-1] if problems else "no video of the tars is in the annotation file"
    for sample in found.values():
        try:
            mp4 = read_mp4(_content(sample))
        except ValueError as error:
            reason = f"{sample.tar.name} {sample.key}: {error}"
            continue
        side = min(mp4.width, mp4.height) // 2 * 2
        lengths = np.diff(mp4.keys, append=mp4.num_frames)
        return Encoding(FramesPerSecond(round(mp4.fps, 3)), max(16, min(side, 2160)), gop=int(lengths.max()))
    raise ValueError(f"none of the {len(found)} videos that were found can be used; the last: {reason}")
