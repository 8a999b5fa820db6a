"""The video files that a user named: found, given a name each, and packed into shards if need be."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from re2tal.data.addresses.address import Address, Source, as_address
from re2tal.data.addresses.remote import check_library, list_folder
from re2tal.data.building.annotations import Annotations
from re2tal.data.building.build import BuildConfig, build_shards
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.named_files import walk
from re2tal.data.building.probe import probe_video
from re2tal.data.contract.manifest import Encoding, FramesPerSecond, FramesPerVideo, Rejection
from re2tal.data.contract.shards import ShardSet, open_shards
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole, Slide, Trimmed
from re2tal.machine import num_cores
from re2tal.reporting.found import as_text
from re2tal.structures import VideoRecord
from re2tal.video_ids import VIDEO_SUFFIXES

F = TypeVar("F", Path, Source)

logger = logging.getLogger(__name__)

SUBSET = "detect"
PROBE_SECONDS = 120.0
"""a file whose packets cannot be counted in this time is left out"""


@dataclass(frozen=True, slots=True)
class VideoFiles:
    """What a user's paths and addresses come to."""

    names: dict[Source, str]
    """File -> its name in results: the file's without suffix; with it, or with its folders too, where two are alike."""
    odd: list[Path]
    """Files of the folders that are no videos by their suffix."""


def find_videos(paths: Sequence[Path | str], *, recursive: bool = False) -> VideoFiles:
    """Files as they are given, and the video files of folders, by name; with `recursive` those of their folders too.

    The address of a folder in a bucket is listed; whether a video is there turns out when it is read. ValueError for an
    address that cannot be opened, for a path that does not exist, and where there is no video at all.
    """
    files: list[Source] = []
    odd = []
    for given in paths:
        path = Path(given)
        if (address := as_address(given)) is not None:
            inside_there = _at(address, recursive=recursive)
            files += [one for one in inside_there if one == address or _is_video(Path(one.name))]
            odd += [Path(str(one)) for one in inside_there if one != address and not _is_video(Path(one.name))]
        elif path.is_dir():
            inside = _inside(path) if recursive else sorted(one for one in path.iterdir() if not one.is_dir())
            files += [one for one in inside if _is_video(one)]
            odd += [one for one in inside if not _is_video(one)]
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path} is not a folder or a file; check the path")
    files = list(dict.fromkeys(files))
    if not files:
        wanted = f"wanted one of {', '.join(VIDEO_SUFFIXES)}{'' if recursive else ', or --recursive for its folders'}"
        raise ValueError(f"{', '.join(map(str, paths))} holds no video file; {wanted}")
    names = _names(files)
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise ValueError(f"two addresses are both called {twice[0]} in results; give one of them at a time")
    return VideoFiles(names, odd)


def _inside(folder: Path) -> list[Path]:
    """The files of a folder and its sub-folders, by name; what is not looked at is said."""
    passed_over: list[str] = []
    files = sorted(root / name for root, _, names in walk(folder, passed_over) for name in names)
    for sentence in passed_over:
        logger.warning("%s", sentence)
    return files


def _at(address: Address, *, recursive: bool) -> list[Address]:
    """A video's address itself, or those in a folder."""
    check_library(address)
    is_folder = address.url.endswith("/")
    if _is_video(Path(address.name)) and not is_folder:
        return [address]
    if not address.is_web:
        return list_folder(address, recursive=recursive)
    if is_folder:
        raise ValueError(f"{address} is a folder on the web, which cannot be listed; give the address of each video")
    return [address]


def list_videos(folder: Path) -> list[Path]:
    """The video files of a folder and its sub-folders, by name; ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that holds video files")
    return [path for path in find_videos([folder], recursive=True).names if isinstance(path, Path)]


def _is_video(path: Path) -> bool:
    # macOS leaves ._ files with a copy's attributes beside each file.
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("._")


def _names(files: Sequence[F]) -> dict[F, str]:
    names = {path: path.stem for path in files}
    # First with the suffix, then with all folders: names stay as short as they can be told apart.
    for longer in (lambda path: path.name, lambda path: path.as_posix()):
        given = Counter(names.values())
        names = {path: longer(path) if given[name] > 1 else name for path, name in names.items()}
    return {path: as_text(name) for path, name in names.items()}


def pack_videos(
    files: Sequence[Path], scratch: Path, clips: ClipConfig, *, classes: Iterable[str]
) -> tuple[ShardSet, dict[str, str], list[Rejection]]:
    """Shards of video files, the name of each id, and the files that cannot be used.

    File names may hold anything, ids may not: the files are linked under numbers. Raises ValueError if none of the
    files can be used.
    """
    own_names = _names(files)
    links = scratch / "videos"
    links.mkdir()
    names, records, rejected = {}, [], []
    with Isolated() as isolated:
        for number, path in enumerate(files):
            try:
                seconds = float(isolated.call(PROBE_SECONDS, probe_video, path).duration_seconds)
            except ValueError as error:
                rejected.append(Rejection(path.name, str(error)))
                continue
            video_id = f"video-{number:06d}"
            names[video_id] = own_names[path]
            (links / f"{video_id}{path.suffix.lower()}").symlink_to(path.resolve())
            records.append(VideoRecord(video_id, SUBSET, seconds, ()))
    if not records:
        raise ValueError(f"none of the {len(files)} videos in {files[0].parent} can be used; {rejected[0].reason}")
    built = build_shards(
        Annotations({SUBSET: tuple(records)}, tuple(classes)),
        videos=links,
        out=scratch / "shards",
        subset=SUBSET,
        config=BuildConfig(dataset=SUBSET, encoding=encoding_for(clips), workers=num_cores()),
    )
    rejected += [Rejection(names[one.video_id], one.reason) for one in built.rejected]
    for one in built.damaged:
        logger.warning("%s: %s", names[one.video_id], one.damage)
    return open_shards(built.folder), names, rejected


def encoding_for(clips: ClipConfig) -> Encoding:
    """The encoding for videos that only serve these clips: their size and rate, whole pictures."""
    short_side = max(16, clips.size + clips.size % 2)
    match clips.windowing:
        case ResizeWhole(num_frames=num_frames):
            return Encoding(FramesPerVideo(num_frames), short_side=short_side)
        case Slide(frames_per_second=rate) | Trimmed(frames_per_second=rate):
            if rate is None:
                raise ValueError(
                    "data.clips.windowing.frames_per_second of this run is null, the rate of its shards, so at which "
                    "rate to take other videos is not known; build shards of them and detect in those"
                )
            return Encoding(FramesPerSecond(rate), short_side=short_side)
