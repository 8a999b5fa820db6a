"""An index of any size: what planning needs of each video, in columns that processes share; the rest when it is asked.

    index.jsonl                 one entry a line; a line is parsed when its video is wanted
    index.{sha256[:16]}.npy     a row per video and one for the end: start of its line, samples, rate, shard, checksums

The build writes both. The name says which index.jsonl the columns belong to; without them an index is read whole. A
line that is used is compared with its row.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np

from re2tal.data.contract.feature_manifest import IndexedFeatures
from re2tal.data.contract.manifest import INDEX_NAME, IndexedVideo, from_json
from re2tal.files import atomic_file

Entry = TypeVar("Entry", IndexedVideo, IndexedFeatures)

ROW = np.dtype(
    [
        ("start", "<i8"),
        ("num_samples", "<i8"),
        ("samples_per_second", "<f8"),
        ("shard", "<i4"),
        ("crc32", "<u4"),  # of the line, its end included
        ("id", "<u8"),  # of the video id: BLAKE2b of 8 bytes
    ]
)


class UnusableColumns(ValueError):
    """A file of columns that is damaged, or of another index or version."""


def columns_path(root: Path, index_sha256: str) -> Path:
    """Where the columns of the index with this checksum are."""
    return root / f"index.{index_sha256[:16]}.npy"


def new_index_path(root: Path, index_sha256: str) -> Path:
    """Where an index is written before the manifest that names it: it becomes index.jsonl after that."""
    return root / f"index.{index_sha256[:16]}.jsonl"


def index_path(root: Path, index_sha256: str) -> Path:
    """The index that a manifest with this checksum belongs to, also where its change was broken off at the end."""
    new = new_index_path(root, index_sha256)
    return new if new.is_file() else root / INDEX_NAME


def columns_of(videos: Sequence[IndexedVideo | IndexedFeatures]) -> np.ndarray:
    """(N,) `ROW`: of a mapped index its own, of other entries made here, without places and checksums."""
    if isinstance(videos, MappedIndex):
        return videos.columns
    shards: dict[str, int] = {}
    rows = [(0, v.num_samples, v.samples_per_second, shards.setdefault(v.shard, len(shards)), 0, 0) for v in videos]
    # Zeros where a row says where its line is: without columns on the disk nobody asks for that.
    return np.array(rows, ROW)


def shared_ids(
    some: Sequence[IndexedVideo | IndexedFeatures], others: Sequence[IndexedVideo | IndexedFeatures]
) -> list[str]:
    """Ids that two indexes have in common, without reading them whole."""
    # Hashes of 64 bits: of two million ids, two differ and agree by chance once in ten million folders.
    places = np.flatnonzero(np.isin(_id_numbers(some), _id_numbers(others)))
    return [some[int(place)].record.video_id for place in places]


def _id_numbers(videos: Sequence[IndexedVideo | IndexedFeatures]) -> np.ndarray:
    if isinstance(videos, MappedIndex):
        return videos.columns["id"]
    return np.array([_id_number(video) for video in videos], ROW["id"])


def write_columns(
    root: Path, videos: Sequence[IndexedVideo | IndexedFeatures], lines: Sequence[bytes], *, index_sha256: str
) -> None:
    """Write the columns of an index after it was written; `lines` are its lines, ends included."""
    # One row more than videos, so that each line ends where the next row begins.
    rows = np.zeros(len(videos) + 1, ROW)
    rows[:-1] = columns_of(videos)
    rows["start"][1:] = np.cumsum([len(line) for line in lines])
    rows["crc32"][:-1] = [zlib.crc32(line) for line in lines]
    rows["id"][:-1] = [_id_number(video) for video in videos]
    with atomic_file(columns_path(root, index_sha256)) as file:
        np.save(file, rows)


def _id_number(video: IndexedVideo | IndexedFeatures) -> int:
    return int.from_bytes(hashlib.blake2b(video.record.video_id.encode(), digest_size=8).digest(), "little")


class MappedIndex(Sequence[Entry], Generic[Entry]):
    """The entries of index.jsonl, each parsed and checked when it is asked for. Processes share its memory."""

    def __init__(
        self, root: Path, kind: type[Entry], index_sha256: str, shards: tuple[str, ...], check: Callable[[Entry], None]
    ) -> None:
        """UnusableColumns where the columns are not those of an index of this size; `check` raises for a wrong entry.
        `shards` are the names that the columns count."""
        # What a spawned worker is sent: it maps the files itself, as a mapping cannot be pickled.
        self._made_from: tuple[object, ...] = (root, kind, index_sha256, shards, check)
        self._path = index_path(root, index_sha256)
        self._kind: type[Entry] = kind
        self._shards = shards
        self._check: Callable[[Entry], None] = check
        path = columns_path(root, index_sha256)
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # of a damaged header, whatever the parsers that NumPy uses raise
            raise UnusableColumns(f"it is damaged: {error}") from None
        size = self._path.stat().st_size
        if not isinstance(rows, np.ndarray):
            raise UnusableColumns("it is no array of NumPy")
        if rows.dtype != ROW or rows.ndim != 1:
            raise UnusableColumns("it has other columns; to run the command that made the folder again renews it")
        # The last row says where the index ends: a wrong file is seen without reading it.
        if len(rows) < 2 or not rows["start"][-1] == size > 0:
            raise UnusableColumns(f"it is not of {self._path}")
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
        line, row = self._lines[start:end], self.columns[number]
        # The checksum of the whole index is not taken at each start (see `shards._read`), so each line that is used is.
        if zlib.crc32(line) != row["crc32"]:
            raise self._disagree(number)
        entry = from_json(self._kind, line, source=f"{self._path} line {number + 1}")
        if (
            entry.num_samples != row["num_samples"]
            # Not ==: steps per second are 1 / seconds per step, which is rounded.
            or not math.isclose(entry.samples_per_second, row["samples_per_second"], rel_tol=1e-9)
            or self._shards[row["shard"] : row["shard"] + 1] != (entry.shard,)
            or _id_number(entry) != row["id"]
        ):
            raise self._disagree(number)
        self._check(entry)
        return entry

    def _disagree(self, number: int) -> ValueError:
        return ValueError(f"{self._path} line {number + 1} is not what the columns beside it say; delete the .npy")

    def repeated(self) -> Entry | None:
        """A video whose id another one has too."""
        # Sorted alone first: which ones are equal takes twice the memory, and nearly always none are.
        ids = np.sort(self.columns["id"])
        if not bool((ids[1:] == ids[:-1]).any()):
            return None
        ids = self.columns["id"]
        order = np.argsort(ids, kind="stable")
        for place in np.flatnonzero(ids[order[1:]] == ids[order[:-1]]).tolist():
            first, second = self[int(order[place])], self[int(order[place + 1])]
            # Equal hashes may be chance.
            if first.record.video_id == second.record.video_id:
                return second
        return None

    def __iter__(self) -> Iterator[Entry]:
        return (self[number] for number in range(len(self)))
