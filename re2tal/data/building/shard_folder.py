"""What building folders of videos and of features has in common: what is listed, what a run left behind, settings."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from re2tal.data.building.clips import TrimmedClip
from re2tal.data.contract.feature_manifest import FeatureManifest, IndexedFeatures
from re2tal.data.contract.manifest import DamagedVideo, IndexedVideo, Manifest, Rejection, ShardFile, Totals, to_json
from re2tal.structures import VideoRecord

REPORTS = ".reports"
"""Folder of the shard reports inside a shard folder."""

Listed = VideoRecord | TrimmedClip
"""A video that is to be packed: with actions in it, or one that is a single action, whose length is not known yet."""


@dataclass(frozen=True, slots=True)
class BuiltSubset:
    """What a run left behind."""

    folder: Path
    num_videos: int
    """Videos that the annotation file lists and that are not blocked."""
    num_shards: int
    num_missing_shards: int
    """Shards that other parts have still to build."""
    rejected: tuple[Rejection, ...]
    """Known so far."""
    damaged: tuple[DamagedVideo, ...] = ()
    """Stored in spite of it; known so far."""
    num_copies: int = 0
    """Videos that are stored as they came, so that rate and size may differ from the manifest's `encoding`."""
    notes: tuple[str, ...] = ()
    """Files that were not taken beside others of their video, and those that --copy did not keep: a sentence each."""

    @property
    def is_complete(self) -> bool:
        """Whether the folder has its manifest and can be opened."""
        return self.num_missing_shards == 0

    @property
    def rejected_share(self) -> float:
        """Share of the videos that could not be used."""
        return len(self.rejected) / self.num_videos


class NothingUsableError(ValueError):
    """No video of a subset can be used."""

    def __init__(self, rejected: Sequence[Rejection]) -> None:
        first = rejected[0]
        what = f"the first, {first.video_id}: {first.reason}"
        super().__init__(f"none of the {len(rejected)} videos can be used; {what}")


def fingerprint(*parts: str) -> str:
    """One name for all that a shard is made from."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def refuse_other_settings(root: Path, manifest: Manifest | FeatureManifest, settings: Mapping[str, Any]) -> None:
    """ValueError where a folder was built with other settings: these are fields of its manifest."""
    for name, value in settings.items():
        theirs, ours = _shown(getattr(manifest, name)), _shown(value)
        if theirs != ours:
            raise ValueError(
                f"{root} was built with {name} {theirs[:600]}, now it is {ours[:600]}; "
                "give another --out, or delete that folder"
            )


def shards_in_use(files: Sequence[ShardFile], entries: Sequence[IndexedVideo | IndexedFeatures]) -> list[ShardFile]:
    """The shards that hold listed videos, with their number."""
    counts = Counter(entry.shard for entry in entries)
    return [replace(file, videos=counts[file.name]) for file in files if counts[file.name]]


def totals_of(entries: Sequence[IndexedVideo], files: Sequence[ShardFile]) -> Totals:
    """Sums over a folder."""
    return Totals(
        videos=len(entries),
        frames=sum(entry.num_frames for entry in entries),
        seconds=sum(entry.video_seconds for entry in entries),
        num_bytes=sum(file.num_bytes for file in files),
    )


def _shown(value: object) -> str:
    return to_json(value) if is_dataclass(value) else str(value)
