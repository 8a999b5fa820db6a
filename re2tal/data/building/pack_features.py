"""Import features of other programs: one file per video, with the times of its steps.

with a stride     step j was computed from frames [j * stride, j * stride + window); it stands for the stretch of
                  `stride` frames in the middle of these:  start_seconds = (window - stride) / 2 / fps
resized           T steps are T equal stretches of the whole video
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from re2tal.data.building.annotation_entries import duration_tolerance
from re2tal.data.building.build_features import Computed, FeatureShard
from re2tal.data.building.content import content_id
from re2tal.data.building.feature_files import FEATURE_SUFFIXES, HDF5_SUFFIXES, FeatureFile
from re2tal.data.building.named_files import Chosen, NamedFiles
from re2tal.data.contract.feature_manifest import SourceFile
from re2tal.files import sha256_of
from re2tal.structures import VideoRecord

Layout = Literal["tc", "ct"]
"""Order of a file's axes: (T, C) or (C, T)."""
NO_FILE = "there is no file of this name"
SAMPLE = 64
"""Files that are opened to learn the order of their axes and the number of channels, before any is packed."""


@dataclass(frozen=True, slots=True)
class Strided:
    """A step every `stride_frames` frames, computed from `window_frames` frames."""

    stride_frames: int
    window_frames: int
    fps: float | Mapping[str, float]
    """Frames per second of all videos, or of each, by id."""

    def place(self, record: VideoRecord, num_steps: int) -> tuple[float, float]:
        """(start_seconds, seconds_per_step); ValueError where so many steps do not fit the video's duration."""
        fps = self._fps_of(record.video_id)
        end_seconds = self.seconds(record.video_id, num_steps)
        # The last window ends with the video, or up to a stride before, or, padded, up to a window after it.
        tolerance = duration_tolerance(record.duration_seconds) + (self.stride_frames + self.window_frames) / fps
        if abs(end_seconds - record.duration_seconds) > tolerance:
            raise ValueError(
                f"{num_steps} steps of {self.stride_frames} frames at {fps:g} frames per second end at "
                f"{end_seconds:.2f} s, the annotation file says {record.duration_seconds:.2f} s"
            )
        return (self.window_frames - self.stride_frames) / 2 / fps, self.stride_frames / fps

    def seconds(self, video_id: str, num_steps: int) -> float:
        """Where the last step's window ends: how long a video of so many steps lasts at least."""
        return ((num_steps - 1) * self.stride_frames + self.window_frames) / self._fps_of(video_id)

    def _fps_of(self, video_id: str) -> float:
        fps = self.fps if isinstance(self.fps, float) else self.fps.get(video_id)
        if fps is None:
            raise ValueError("the annotation file says neither its fps nor its number of frames; give --fps")
        return fps


@dataclass(frozen=True, slots=True)
class Resized:
    """Every video as `num_steps` steps, whatever its length."""

    num_steps: int

    def place(self, record: VideoRecord, num_steps: int) -> tuple[float, float]:
        """(start_seconds, seconds_per_step); ValueError where the file has another number of steps."""
        if num_steps != self.num_steps:
            raise ValueError(f"has {num_steps} steps, every video should have {self.num_steps}")
        return 0.0, record.duration_seconds / num_steps


@dataclass(frozen=True, slots=True)
class FeatureFiles:
    """The files of features in a folder, or in one HDF5 file."""

    place: Path
    file_names: tuple[str, ...]
    """Names that a video's file may have, without the suffix of its format."""
    files: tuple[FeatureFile, ...]
    """All whose format can be read."""

    def find(self, video_ids: Sequence[str], others: Sequence[str] = ()) -> Chosen[FeatureFile]:
        """The file of each video, which none of the `others` may be too; ValueError where none has one, with what lies
        in the folder."""
        everyone = list(dict.fromkeys([*video_ids, *others]))
        chosen = NamedFiles(self.files).choose(everyone, self.file_names).only(video_ids)
        if not chosen.found and not chosen.faults:
            looked = ", ".join(name.format(id=video_ids[0]) + ".npy" for name in self.file_names)
            raise ValueError(
                f"none of the {len(video_ids)} videos has features in {self.place}; looked for {looked} (or "
                f"{', '.join(FEATURE_SUFFIXES[1:])}) and so on; {self._what_is_there()}; if only their ends differ, "
                "give --prefix and --suffix"
            )
        if not chosen.found:
            raise ValueError(
                f"{self.place}: {next(iter(chosen.faults.values()))}, or choose with --prefix and --suffix"
            )
        return chosen

    def _what_is_there(self) -> str:
        if self.files:
            shown = ", ".join(file.name for file in self.files[:3])
            return f"there are {len(self.files)} files such as {shown}"
        names = sorted(one.name for one in self.place.iterdir()) if self.place.is_dir() else []
        return f"it holds {', '.join(map(repr, names[:3])) or 'nothing'}" + (" and more" if len(names) > 3 else "")


@dataclass(frozen=True, slots=True)
class Packer:
    """Reads the files of videos."""

    chosen: Chosen[FeatureFile]
    key: str | None
    """Name of the array in files that hold several."""
    layout: Layout
    timing: Strided | Resized

    def run(self, records: Sequence[VideoRecord]) -> Iterator[Computed | str]:
        """The features of `records`, in their order; where a file cannot be used, why."""
        for record in records:
            try:
                yield self._computed(record)
            except OSError as error:
                yield f"its file cannot be read: {error.strerror}"
            except ValueError as error:
                yield str(error)

    def _computed(self, record: VideoRecord) -> Computed:
        file = self.chosen.found.get(record.video_id)
        if file is None:
            raise ValueError(self.chosen.faults.get(record.video_id, NO_FILE))
        values = file.load(key=self.key)
        values = values.T if self.layout == "tc" else values
        start_seconds, seconds_per_step = self.timing.place(record, values.shape[1])
        source = SourceFile(file.path.name, _sha256(file.path, file.path.stat().st_mtime_ns))
        # A copy: the file's own array is mapped, and may be read-only or turned.
        tensor = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        return Computed(tensor, seconds_per_step, start_seconds, source)


@lru_cache(maxsize=1)
def _sha256(path: Path, modified: int) -> str:
    """Of a file that may hold many videos: it is hashed once."""
    return sha256_of(path)


def sample_shapes(found: Mapping[str, FeatureFile], *, key: str | None) -> dict[str, tuple[int, int]]:
    """Video id -> shape of its array, for some of the videos, spread over all; ValueError if no file can be used."""
    shapes: dict[str, tuple[int, int]] = {}
    unusable: list[str] = []
    video_ids = list(found)
    # Spread over the list first, as neighbours may come from one program; then all, where some of these cannot be read.
    for video_id in video_ids[:: -(-len(video_ids) // SAMPLE)] + video_ids:
        if len(shapes) == SAMPLE or (shapes and len(unusable) >= SAMPLE):
            break
        if video_id in shapes:
            continue
        try:
            rows, columns = found[video_id].load(key=key).shape
            shapes[video_id] = rows, columns
        except ValueError as error:  # the video is left out for it when its turn comes
            unusable.append(str(error))
    if not shapes:
        raise ValueError(f"none of the {len(found)} files can be used; {unusable[0]}")
    return shapes


def find_layout(shapes: Mapping[str, tuple[int, int]], fits: Callable[[str, int], bool] | None = None) -> Layout:
    """The order of the axes: all files have the same channels, and most differ in time.

    Where both axes are the same in most files, `fits(video_id, num_steps)` decides, if it says so many steps fit only
    one order. Raises ValueError where nothing tells the two apart.
    """
    # In most files and not in all: one odd file must not hide what the others tell.
    constant = [2 * _most_common(shapes, axis)[1] > len(shapes) for axis in (0, 1)]
    shape = "x".join(map(str, next(iter(shapes.values()))))
    if constant == [False, True]:
        return "tc"
    if constant == [True, False]:
        return "ct"
    if constant == [False, False]:
        some = ", ".join(f"{rows}x{columns}" for rows, columns in [*shapes.values()][:4])
        raise ValueError(f"the {len(shapes)} files have shapes such as {some}: no axis has the same length in most")
    if fits is not None:
        fitting = [sum(fits(video_id, one[axis]) for video_id, one in shapes.items()) for axis in (0, 1)]
        if fitting[0] and not fitting[1]:
            return "tc"
        if fitting[1] and not fitting[0]:
            return "ct"
    raise ValueError(
        f"{len(shapes)} files, of shape {shape}, do not tell which axis is time; give --layout tc if it is the first, "
        "or --layout ct"
    )


def count_channels(shapes: Mapping[str, tuple[int, int]], *, layout: Layout) -> int:
    """Number of channels of most files; ValueError if fewer than half agree: then the axes are swapped."""
    axis = 1 if layout == "tc" else 0
    channels, agreeing = _most_common(shapes, axis)
    if 2 * agreeing < len(shapes) or (len(shapes) > 1 and agreeing == 1):
        lengths = sorted({shape[axis] for shape in shapes.values()})
        raise ValueError(
            f"with --layout {layout}, {len(shapes)} files have {len(lengths)} different numbers of channels, such as "
            f"{lengths[:4]}; give --layout {'ct' if layout == 'tc' else 'tc'} if their axes are in the other order"
        )
    return channels


def _most_common(shapes: Mapping[str, tuple[int, int]], axis: int) -> tuple[int, int]:
    """(length, in how many files) of an axis."""
    return Counter(shape[axis] for shape in shapes.values()).most_common(1)[0]


def plan_feature_shards(
    records: Sequence[VideoRecord], chosen: Chosen[FeatureFile], *, seed: int, videos_per_shard: int | None
) -> list[FeatureShard]:
    """Put records into shards in an order that depends on the seed alone; videos without a file keep their place.

    `videos_per_shard` None: as many as give 32 shards or more, from 4 to 256.
    """
    paths = list({one.path: None for record in records if (one := chosen.found.get(record.video_id))})
    with ThreadPoolExecutor(8) as pool:  # on a disk of the network each file takes a while
        marks = dict(zip(paths, pool.map(_mark, paths), strict=True))

    def mark(video_id: str) -> str:
        one = chosen.found.get(video_id)
        return f"{one.name} {marks[one.path]}" if one else chosen.faults.get(video_id, "missing")

    order = list(records)
    # Shuffled once and for all, so that a shard holds videos of all kinds: training shuffles within a span only.
    random.Random(seed).shuffle(order)
    size = videos_per_shard or min(256, max(4, -(-len(order) // 32)))
    shards = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
    return [
        FeatureShard(f"shard-{number:06d}.tar", some, tuple(mark(record.video_id) for record in some))
        for number, some in enumerate(shards)
    ]


def _mark(path: Path) -> str:
    """What tells a file from the one that it replaced: features of another network have the same size."""
    try:
        mark = content_id(path)
        # Of a file of many videos most lies between the blocks that were read.
        return f"{mark} {path.stat().st_mtime_ns}" if path.suffix.lower() in HDF5_SUFFIXES else mark
    except OSError as error:
        return f"unreadable: {error.strerror}"
