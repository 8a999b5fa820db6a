"""Plain WebDataset tars (key.mp4 beside key.json, .txt or .cls) into a shard folder, without encoding anything.

    headers of the tars -> samples -> (a video at a time) tables, then pictures in a process of its own -> shards

Only videos whose frames decord numbers right are taken, byte by byte; the others are left out, and the manifest says
why. Members that are no video and no label are ignored.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

import av
import numpy as np

from re2tal.data.building.annotations import Annotations, duration_tolerance
from re2tal.data.building.build import describe_videos
from re2tal.data.building.check import MAX_DIFFERENCE, small, spread
from re2tal.data.building.clips import Classes, ClipList, TrimmedClip
from re2tal.data.building.isolated import Isolated, still_working
from re2tal.data.building.labels import is_label, twin_problems
from re2tal.data.building.pack_videos import SILENT_SECONDS
from re2tal.data.building.probe import open_video
from re2tal.data.building.shard_folder import (
    BuiltSubset,
    Listed,
    PackedVideo,
    ShardFolder,
    ShardPlan,
    fingerprint,
    share_out,
)
from re2tal.data.contract.manifest import (
    Encoding,
    FramesPerSecond,
    IndexedVideo,
    Manifest,
    Rejection,
    SourceVideo,
    StoredVideo,
    to_json,
)
from re2tal.data.contract.mp4 import Mp4, read_mp4
from re2tal.data.streaming.decode import count_frames, decode_frames
from re2tal.strict_json import sha256_of
from re2tal.structures import VideoRecord
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


def list_clips(samples: Iterable[Sample], *, subset: str, classes: Sequence[str] | None) -> tuple[ClipList, list[str]]:
    """(trimmed clips that name their class, samples that do not); an id that two samples have is there once."""
    labels: list[tuple[Sample, str]] = []
    left_out = []
    for sample in samples:
        try:
            if fault := id_fault(Path(sample.key).name):
                raise ValueError(f"its key is no id: {fault}")
            labels.append((sample, sample.label()))
        except ValueError as error:
            left_out.append(f"{sample.tar.name} {sample.key}: {error}")
    names = Classes((label for _, label in labels), classes, or_fix="")
    clips: dict[str, TrimmedClip] = {}
    for sample, label in labels:
        try:
            name = Path(sample.key).name
            clips.setdefault(name, TrimmedClip(name, subset, names.name(label)))
        except ValueError as error:
            left_out.append(f"{sample.tar.name} {sample.key}: {error}")
    if twins := twin_problems((clip.label for clip in clips.values()), ", or give --classes FILE"):
        raise ValueError("; ".join(twins[:20]))
    if not clips:
        raise ValueError(f"no sample can be used: {left_out[:1]}; give --annotations, or labels in .cls, .txt or .json")
    found = tuple(sorted({clip.label for clip in clips.values()})) if classes is None else tuple(classes)
    return ClipList(subsets={subset: tuple(clips.values())}, classes=found, paths={}), left_out


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
    listed: Annotations | ClipList, matches: Matches, *, out: Path, subset: str, dataset: str
) -> BuiltSubset:
    """Write `out/subset` from the samples of the videos that are listed; ValueError where no video can be used."""
    records: list[Listed] = list(listed.subset(subset))
    found = {record.video_id: matches.found[record.video_id] for record in records if record.video_id in matches.found}
    problems = [f"{one.video_id}: {matches.faults[one.video_id]}" for one in records if one.video_id in matches.faults]
    folder = ShardFolder(
        out / subset,
        Manifest,
        IndexedVideo,
        settings={
            "dataset": dataset,
            "encoding": _first_encoding(found, problems),
            "classes": listed.classes,
            "seed": 0,
        },
        describe=partial(describe_videos, subset),
    )

    def write(plans: Sequence[ShardPlan[Listed]]) -> None:
        with Isolated() as isolated, TemporaryDirectory(prefix="re2tal-index-") as scratch:
            for plan in plans:
                folder.write(plan, _packed(plan, matches, isolated, Path(scratch) / "video.mp4"))

    return folder.build(_plans(records, matches), write)


def _plans(records: Sequence[Listed], matches: Matches) -> list[ShardPlan[Listed]]:
    plans = []
    for name, chosen in share_out(records, seed=0, per_shard=None, most=64):
        parts = ["index 1"]
        for record in chosen:
            sample = matches.found.get(record.video_id)
            place = matches.faults.get(record.video_id, "missing")
            if sample:
                place = f"{sample.tar.name} {sample.tar.stat().st_size} {sample.videos}{sample.fault}"
            parts += [to_json(record), place]
        plans.append(ShardPlan(name, chosen, fingerprint(*parts)))
    return plans


def _packed(
    plan: ShardPlan[Listed], matches: Matches, isolated: Isolated, scratch: Path
) -> Iterator[PackedVideo | Rejection]:
    for record in plan.records:
        sample = matches.found.get(record.video_id)
        try:
            if sample is None:
                raise ValueError(matches.faults.get(record.video_id, "no sample of the tars has this name"))
            yield _packed_one(record, sample, isolated, scratch)
        except ValueError as error:
            where = f"{sample.tar.name} {sample.key}: " if sample else ""
            yield Rejection(record.video_id, where + str(error).replace(str(scratch), "its video"))


def _packed_one(listed: Listed, sample: Sample, isolated: Isolated, scratch: Path) -> PackedVideo:
    content = _content(sample)
    mp4 = read_mp4(content)
    seconds = mp4.num_frames / mp4.fps
    record = listed if isinstance(listed, VideoRecord) else listed.lasting(seconds)
    if abs(seconds - record.duration_seconds) > duration_tolerance(record.duration_seconds):
        raise ValueError(f"it lasts {seconds:.2f} s, the annotation file says {record.duration_seconds:.2f} s")
    scratch.write_bytes(content)
    isolated.call(SILENT_SECONDS, check_pictures, scratch)
    name = f"{sample.tar.name}/{sample.key}"
    source = SourceVideo(name, sha256_of(scratch), "h264", mp4.num_frames, seconds)
    return PackedVideo(StoredVideo(record, mp4.num_frames, mp4.fps, mp4.width, mp4.height, source), content)


def _content(sample: Sample) -> bytes:
    if sample.fault:
        raise ValueError(sample.fault)
    if len(sample.videos) != 1:
        raise ValueError(f"it has {len(sample.videos)} videos ({', '.join(sample.videos)}); one is wanted")
    ((offset, size),) = sample.videos.values()
    with sample.tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def check_pictures(path: Path) -> None:
    """Decode a file from its start to its end, and compare some pictures with those that decord gives by number."""
    content = path.read_bytes()
    mp4 = read_mp4(content)
    numbers = spread(mp4.num_frames)
    pictures: dict[int, np.ndarray] = {}
    count = 0
    with open_video(path) as (container, stream):
        for frame in container.decode(stream):
            assert isinstance(frame, av.VideoFrame)
            still_working()
            if frame.is_corrupt:
                raise ValueError(f"frame {count} is damaged")
            if (frame.width, frame.height) != (mp4.width, mp4.height):
                raise ValueError(
                    f"frame {count} is {frame.width}x{frame.height}, the header says {mp4.width}x{mp4.height}"
                )
            if count in numbers:
                pictures[count] = small(frame.to_ndarray(format="rgb24"))
            count += 1
    if not count == mp4.num_frames == count_frames(content):
        raise ValueError(f"{count} frames decode and decord sees {count_frames(content)}, of {mp4.num_frames}")
    _compare(mp4, pictures)


def _compare(mp4: Mp4, pictures: Mapping[int, np.ndarray]) -> None:
    for number, picture in zip(pictures, decode_frames(*mp4.cut(list(pictures))).numpy(), strict=True):
        difference = np.abs(small(picture) - pictures[number]).mean()
        if difference > MAX_DIFFERENCE:
            raise ValueError(f"read by its number, frame {number} is another picture ({difference:.1f} levels off)")


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
