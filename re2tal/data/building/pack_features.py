"""Import features of other programs: one .npy file per video, with the times of its steps.

with a stride     step j was computed from frames [j * stride, j * stride + window); it stands for the stretch of
                  `stride` frames in the middle of these:  start_seconds = (window - stride) / 2 / fps
resized           T steps are T equal stretches of the whole video
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from re2tal.data.building.annotations import duration_tolerance
from re2tal.data.building.build_features import Computed, FeatureShard
from re2tal.data.building.shard_folder import share_out
from re2tal.data.contract.feature_manifest import SourceFile
from re2tal.strict_json import sha256_of
from re2tal.structures import VideoRecord

Layout = Literal["tc", "ct"]
"""Order of a file's axes: (T, C) or (C, T)."""


@dataclass(frozen=True, slots=True)
class Strided:
    """A step every `stride_frames` frames, computed from `window_frames` frames."""

    stride_frames: int
    window_frames: int
    fps: float | Mapping[str, float]
    """Frames per second of all videos, or of each, by id."""

    def place(self, record: VideoRecord, num_steps: int) -> tuple[float, float]:
        """(start_seconds, seconds_per_step); ValueError where so many steps do not fit the video's duration."""
        fps = self.fps if isinstance(self.fps, float) else self.fps.get(record.video_id)
        if fps is None:
            raise ValueError("the annotation file says neither its fps nor its number of frames; give --fps")
        end_seconds = ((num_steps - 1) * self.stride_frames + self.window_frames) / fps
        # The last window ends with the video, or up to a stride before, or, padded, up to a window after it.
        tolerance = duration_tolerance(record.duration_seconds) + (self.stride_frames + self.window_frames) / fps
        if abs(end_seconds - record.duration_seconds) > tolerance:
            raise ValueError(
                f"{num_steps} steps of {self.stride_frames} frames at {fps:g} frames per second end at "
                f"{end_seconds:.2f} s, the annotation file says {record.duration_seconds:.2f} s"
            )
        return (self.window_frames - self.stride_frames) / 2 / fps, self.stride_frames / fps


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
class Packer:
    """Reads the files of videos."""

    files: Mapping[str, Path]
    layout: Layout
    timing: Strided | Resized

    def run(self, records: Sequence[VideoRecord]) -> Iterator[Computed | str]:
        """The features of `records`, in their order; where a file cannot be used, why."""
        for record in records:
            try:
                yield self._computed(record)
            except ValueError as error:
                yield str(error)

    def _computed(self, record: VideoRecord) -> Computed:
        path = self.files.get(record.video_id)
        if path is None:
            raise ValueError("there is no file of this name")
        values = load_array(path)
        values = values.T if self.layout == "tc" else values
        start_seconds, seconds_per_step = self.timing.place(record, values.shape[1])
        source = SourceFile(path.name, sha256_of(path))
        tensor = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        return Computed(tensor, seconds_per_step, start_seconds, source)


def load_array(path: Path) -> np.ndarray:
    """A two-dimensional array of floats, mapped from the disk; ValueError for anything else. Never unpickles."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path.name} is no sound .npy file of numbers ({str(error)[:120]})") from None
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f":
        what = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else "an archive"
        raise ValueError(f"{path.name} holds {what}; wanted floats of shape (T, C) or (C, T)")
    return values


def find_features(folder: Path, video_ids: Sequence[str], *, file_names: Sequence[str]) -> dict[str, Path]:
    """Video id -> its .npy file, for those that are there. Raises ValueError where there is none, or an id has two."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds the .npy files")
    found: dict[str, Path] = {}
    for video_id in video_ids:
        paths = [path for name in file_names if (path := folder / f"{name.format(id=video_id)}.npy").is_file()]
        if len(paths) > 1:
            raise ValueError(f"{folder} holds {' and '.join(path.name for path in paths)}, one video's; keep one")
        if paths:
            found[video_id] = paths[0]
    if not found:
        shown = ", ".join(f"{name.format(id=video_ids[0])}.npy" for name in file_names)
        raise ValueError(f"none of the {len(video_ids)} videos has features in {folder}; looked for {shown}")
    return found


def count_channels(files: Mapping[str, Path], *, layout: Layout) -> int:
    """Number of channels of most files; ValueError if fewer than half agree: then the axes are swapped."""
    counts: Counter[int] = Counter()
    unusable = []
    for path in files.values():
        try:
            counts[load_array(path).shape[1 if layout == "tc" else 0]] += 1
        except ValueError as error:  # the video is rejected for it when its turn comes
            unusable.append(str(error))
    if not counts:
        raise ValueError(f"none of the {len(files)} files can be used; {unusable[0]}")
    channels, agreeing = counts.most_common(1)[0]
    if 2 * agreeing < counts.total() or (counts.total() > 1 and agreeing == 1):
        other = "ct" if layout == "tc" else "tc"
        raise ValueError(
            f"with --layout {layout}, {counts.total()} files have {len(counts)} different numbers of channels, such as "
            f"{sorted(counts)[:4]}; give --layout {other} if their axes are in the other order"
        )
    return channels


def plan_feature_shards(
    records: Sequence[VideoRecord], files: Mapping[str, Path], *, seed: int, videos_per_shard: int | None
) -> list[FeatureShard]:
    """Put records into shards in an order that depends on the seed alone; videos without a file keep their place."""
    shards = []
    for name, chosen in share_out(records, seed=seed, per_shard=videos_per_shard, most=256):
        found = (files.get(record.video_id) for record in chosen)
        sources = tuple(f"{path.name} {path.stat().st_size}" if path else "missing" for path in found)
        shards.append(FeatureShard(name, chosen, sources))
    return shards
