"""Plain WebDataset tars (key.mp4 beside key.json, .txt or .cls) into a shard folder, without encoding anything.

    headers of the tars -> samples -> (a video at a time) tables, then pictures in a process of its own -> shards

Only videos whose frames decord numbers right are taken, byte by byte; the others are left out, and the manifest says
why. Members that are no video and no label are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from re2tal.data.building.annotation_entries import UNKNOWN_SECONDS, misfit
from re2tal.data.building.annotations import Annotations
from re2tal.data.building.check import check_normalised
from re2tal.data.building.clips import ClipList
from re2tal.data.building.content import content_id
from re2tal.data.building.copy_video import COPY_DIFFERENCE
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.make_videos import Made
from re2tal.data.building.match_samples import Matches
from re2tal.data.building.pack_videos import SILENT_SECONDS, one_video
from re2tal.data.building.prepare import prepare_video
from re2tal.data.building.shard_folder import BuiltSubset, Listed, fingerprint
from re2tal.data.building.shard_plan import Item
from re2tal.data.building.tar_samples import Sample
from re2tal.data.building.video_folder import VideoFolder
from re2tal.data.contract.manifest import (
    MANIFEST_NAME,
    Encoding,
    FramesPerSecond,
    Manifest,
    StoredVideo,
    read_manifest,
)
from re2tal.data.contract.mp4 import read_mp4
from re2tal.machine import num_cores
from re2tal.structures import VideoRecord


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
        workers=num_cores(),
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
        modified_ns = sample.tar.stat().st_mtime_ns
    except (ValueError, OSError) as error:
        return Item(listed, "", fault=f"{sample.tar.name} {sample.key}: {error}")
    seconds = f"{listed.duration_seconds} s, " if isinstance(listed, VideoRecord) else ""
    return Item(listed, mark, size, terms=f"{seconds}{modified_ns}")


def _made(matches: Matches, listed: Listed, target: Path, isolated: Isolated) -> Made:
    sample = matches.found[listed.video_id]
    try:
        with one_video({str(target): "its video"}):
            return _made_one(listed, sample, target, isolated)
    except ValueError as error:
        raise ValueError(f"{sample.tar.name} {sample.key}: {error}") from None


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
    name = f"{sample.tar.name}/{sample.key}".encode(errors="backslashreplace").decode()  # it need not be UTF-8
    source = replace(made_from, file=name)
    return Made(StoredVideo(mp4.num_frames, mp4.fps, mp4.width, mp4.height, source), seconds, is_copy=True)


def measured_in(samples: Sequence[Sample]) -> Callable[[str], float]:
    """Gives the seconds of the sample that a video is; UNKNOWN_SECONDS where it will be left out for its sample."""
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        for name in set(sample.names):
            by_name.setdefault(name, []).append(sample)

    def measured(video_id: str) -> float:
        try:
            (sample,) = by_name.get(video_id, [])
            mp4 = read_mp4(_content(sample))
        except ValueError:
            return UNKNOWN_SECONDS
        return mp4.num_frames / mp4.fps

    return measured


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
    try:
        with sample.tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise ValueError(f"its tar cannot be read: {error.strerror}") from None


def _encoding(folder: Path, records: Sequence[Listed], matches: Matches) -> Encoding:
    """What the manifest says of rate and size, which may differ from video to video; else that of the first video that
    can be used."""
    if (folder / MANIFEST_NAME).is_file():
        return read_manifest(folder / MANIFEST_NAME, Manifest).encoding
    ids = [record.video_id for record in records]
    problems = [f"{one}: {matches.faults[one]}" for one in ids if one in matches.faults]
    reason = problems[-1] if problems else "no video of the tars is in the annotation file"
    found = [matches.found[one] for one in ids if one in matches.found]
    for sample in found:
        try:
            mp4 = read_mp4(_content(sample))
        except ValueError as error:
            reason = f"{sample.tar.name} {sample.key}: {error}"
            continue
        side = min(mp4.width, mp4.height) // 2 * 2
        lengths = np.diff(mp4.keys, append=mp4.num_frames)
        rate = min(round(mp4.fps, 3), 240.0)  # a manifest names no more, and each video says its own
        return Encoding(FramesPerSecond(rate), max(16, min(side, 2160)), gop=int(lengths.max()))
    raise ValueError(f"none of the {len(found)} videos that were found can be used; the last: {reason}")
