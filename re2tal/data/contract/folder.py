"""A shard folder that was opened: what it holds, and how a video's bytes come out of it, from here or an address."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, Self, TypeVar

from re2tal.data.addresses.address import Address
from re2tal.data.addresses.shared import CachedRange
from re2tal.data.contract.feature_manifest import FeatureManifest, IndexedFeatures
from re2tal.data.contract.manifest import IndexedVideo, Manifest

AnyManifest = TypeVar("AnyManifest", Manifest, FeatureManifest)
Entry = TypeVar("Entry", IndexedVideo, IndexedFeatures)


@dataclass(frozen=True)
class Folder(Generic[AnyManifest, Entry]):
    """A complete, checked folder of shards of videos or of features."""

    root: Path
    """A folder, or an address as a path."""
    manifest: AnyManifest
    manifest_sha256: str
    """Names this data set in the state that a resumed run compares."""
    videos: Sequence[Entry]
    """In shard order, within a shard in tar order."""
    address: Address | None = None
    """Where its shards are, if not on this machine."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label's position is its index. The same in all subsets of one annotation file."""
        return self.manifest.classes

    @property
    def subset(self) -> str:
        """Lower-case subset name."""
        return self.manifest.subset

    @cached_property
    def by_id(self) -> dict[str, Entry]:
        """Videos by id."""
        return {video.record.video_id: video for video in self.videos}

    def only(self, video_ids: Iterable[str]) -> Self:
        """The same folder, of which only these videos are seen, in this order."""
        return replace(self, videos=tuple(self.by_id[video_id] for video_id in video_ids))

    def path(self, shard: str) -> Path:
        """The tar called `shard`; ValueError where it is not on this machine."""
        if self.address is not None:
            raise ValueError(f"{self.place(shard)} has to be on this machine; copy the folder, and give the copy")
        return self.root / shard

    def place(self, shard: str) -> str:
        """Where the tar called `shard` is, for messages."""
        return str(self.root / shard if self.address is None else self.address / shard)

    def stretch(self, video: IndexedVideo | IndexedFeatures) -> bytes:
        """The part of its tar that is a video's; OSError where it cannot be read."""
        if self.address is None:
            return read_stretch(self.root / video.shard, video)
        return self._remote(video).read()

    def forget(self, video: IndexedVideo | IndexedFeatures) -> None:
        """Where what came from an address turned out to be damaged, it is to be asked for again."""
        if self.address is not None:
            self._remote(video).forget()

    def _remote(self, video: IndexedVideo | IndexedFeatures) -> CachedRange:
        assert self.address is not None
        size = self._sizes[video.shard]
        return CachedRange(self.address / video.shard, video.offset, video.num_bytes, size, video.crc32)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {shard.name: shard.num_bytes for shard in self.manifest.shards}


class ShardSet(Folder[Manifest, IndexedVideo]):
    """A complete, checked folder of videos."""


class FeatureSet(Folder[FeatureManifest, IndexedFeatures]):
    """A complete, checked folder of features."""


def read_stretch(path: Path, video: IndexedVideo | IndexedFeatures) -> bytes:
    """The part of a tar that is a video's."""
    with path.open("rb") as file:
        file.seek(video.offset)
        return file.read(video.num_bytes)
