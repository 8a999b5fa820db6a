"""An index of any size: what planning needs of each video, in columns that processes share; the rest when it is asked.

    index.jsonl                 one entry a line; a line is parsed when its video is wanted
    index.{sha256[:16]}.npy     a row per video and one for the end: where its line starts, samples, rate, shard

The build writes both. The name says which index.jsonl the columns belong to; without them an index is read whole.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np

from re2tal.data.contract.feature_manifest import IndexedFeatures
from re2tal.data.contract.manifest import INDEX_NAME, IndexedVideo, from_json

Entry = TypeVar("Entry", IndexedVideo, IndexedFeatures)

ROW = np.dtype([("start", "<i8"), ("num_samples", "<i8"), ("samples_per_second", "<f8"), ("shard", "<i4")])


def columns_path(root: Path, index_sha256: str) -> Path:
    """Where the columns of the index with this checksum are."""
    return root / f"index.{index_sha256[:16]}.npy"


def columns_of(videos: Sequence[IndexedVideo | IndexedFeatures]) -> np.ndarray:
    """(N,) `ROW`: of a mapped index its own, of other entries made here, where no line starts anywhere."""
    if isinstance(videos, MappedIndex):
        return videos.columns
    shards: dict[str, int] = {}
    rows = [(0, v.num_samples, v.samples_per_second, shards.setdefault(v.shard, len(shards))) for v in videos]
    return np.array(rows, ROW)


def write_columns(
    root: Path, videos: Sequence[IndexedVideo | IndexedFeatures], lines: Sequence[bytes], *, index_sha256: str
) -> None:
    """Write the columns of an index after it was written; `lines` are its lines, ends included."""
    rows = np.zeros(len(videos) + 1, ROW)
    rows[:-1] = columns_of(videos)
    rows["start"][1:] = np.cumsum([len(line) for line in lines])
    path = columns_path(root, index_sha256)
    for old in root.glob("index.*.npy"):
        old.unlink(missing_ok=True)  # another part may do the same
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, rows)
    os.replace(temporary, path)


class MappedIndex(Sequence[Entry], Generic[Entry]):
    """The entries of index.jsonl, each parsed and checked when it is asked for. Processes share its memory."""

    def __init__(self, root: Path, kind: type[Entry], index_sha256: str, check: Callable[[Entry], None]) -> None:
        """ValueError where the columns are not those of an index of this size; `check` raises for a wrong entry."""
        self._made_from: tuple[object, ...] = (root, kind, index_sha256, check)
        self._path = root / INDEX_NAME
        self._kind: type[Entry] = kind
        self._check: Callable[[Entry], None] = check
        path = columns_path(root, index_sha256)
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it: the index is then read without it") from None
        size = self._path.stat().st_size
        if rows.dtype != ROW or rows.ndim != 1 or len(rows) < 2 or rows["start"][-1] != size:
            raise ValueError(f"{path} is not of {self._path}; delete it: the index is then read without it")
        self._starts, self.columns = rows, rows[:-1]
        with self._path.open("rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def __reduce__(self) -> tuple[type[MappedIndex], tuple]:
        return type(self), self._made_from

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, place: int) -> Entry: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, place: int | slice) -> Entry | tuple[Entry, ...]:
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(len(self))))
        number = range(len(self))[place]
        start, end = int(self._starts["start"][number]), int(self._starts["start"][number + 1])
        entry = from_json(self._kind, self._lines[start:end], source=f"{self._path} line {number + 1}")
        if entry.num_samples != self.columns["num_samples"][number]:
            raise ValueError(f"{self._path} line {number + 1} is not what the columns beside it say; delete the .npy")
        self._check(entry)
        return entry

    def __iter__(self) -> Iterator[Entry]:
        return (self[number] for number in range(len(self)))
