"""Whether the parts of a shard folder belong together: files, index and manifest, and each entry by itself."""

from __future__ import annotations

import math
import os
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from re2tal.data.contract.columns import index_path
from re2tal.data.contract.feature_manifest import FeatureManifest, IndexedFeatures
from re2tal.data.contract.manifest import INDEX_NAME, MANIFEST_NAME, IndexedVideo, Manifest
from re2tal.files import sha256_of
from re2tal.video_ids import id_fault


def check_index_sha256(root: Path, manifest: Manifest | FeatureManifest) -> None:
    """ValueError where the index is not the one that the manifest was written for."""
    index_sha256 = sha256_of(index_path(root, manifest.index_sha256))
    if index_sha256 != manifest.index_sha256:
        raise ValueError(
            f"{root / INDEX_NAME} is not the one that {MANIFEST_NAME} was written for (sha256 {index_sha256[:12]}..., "
            f"manifest says {manifest.index_sha256[:12]}...); {rebuild_hint(root, manifest)}"
        )


def check_is_shard_folder(root: Path) -> None:
    """ValueError where a folder lacks its manifest or index, with the folders in it that have them."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; if it was moved, give its new place, or else {rebuild_hint(root)}")
    has_index = (root / INDEX_NAME).is_file() or any(root.glob("index.*.jsonl"))
    if (root / MANIFEST_NAME).is_file() and has_index:
        return
    inside = sorted(child.name for child in root.iterdir() if (child / MANIFEST_NAME).is_file())
    if inside:
        raise ValueError(f"{root} holds one shard folder per subset; give one of: {[str(root / n) for n in inside]}")
    missing = [name for name in (MANIFEST_NAME, INDEX_NAME) if not (root / name).is_file()]
    raise ValueError(f"{root} has no {' and no '.join(missing)}: it is no complete shard folder; {rebuild_hint(root)}")


def rebuild_hint(root: Path, manifest: Manifest | FeatureManifest | None = None) -> str:
    """How to make a folder whole again."""
    if isinstance(manifest, FeatureManifest):
        return "run the re2tal features command that made it again; what is sound is kept"
    return (
        "build it (a stopped build goes on where it was) with: re2tal shards build --videos DIR --annotations FILE "
        f"--out {shlex.quote(str(root.parent))} --subsets {root.name}"
    )


def check_files(root: Path, manifest: Manifest | FeatureManifest) -> None:
    """ValueError where a tar is missing, or has another size than the manifest says."""
    for shard in manifest.shards:
        path = f"{root}/{shard.name}"  # not a Path, and asked once: there may be 20,000 of them
        try:
            status = os.stat(path)
        except FileNotFoundError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is missing, though {MANIFEST_NAME} lists it; {rebuild_hint(root, manifest)}")
        size = status.st_size
        if size != shard.num_bytes:
            raise ValueError(
                f"{path} has {size} bytes, {MANIFEST_NAME} says {shard.num_bytes}: it was cut or changed; "
                f"delete it, then {rebuild_hint(root, manifest)}"
            )


def check_index(root: Path, manifest: Manifest | FeatureManifest, counts: Sequence[int], num_samples: int) -> None:
    """`counts`: videos of each shard."""
    index, num_videos, totals = root / INDEX_NAME, sum(counts), manifest.totals
    # By shard and not only in all: two shards that changed places would have the right sum.
    if counts != [shard.videos for shard in manifest.shards] or num_videos == 0:
        raise ValueError(
            f"{index} lists {num_videos} videos in {sum(map(bool, counts))} shards, {MANIFEST_NAME} "
            f"{totals.videos} in {len(manifest.shards)}; {rebuild_hint(root, manifest)}"
        )
    if (num_videos, num_samples) != (totals.videos, totals.num_samples):
        raise ValueError(
            f"{index} holds {num_videos} videos of {num_samples} samples, {MANIFEST_NAME} says {totals.videos} of "
            f"{totals.num_samples}; {rebuild_hint(root, manifest)}"
        )


def check_entries(videos: Sequence[IndexedVideo | IndexedFeatures], check: EntryCheck) -> None:
    """ValueError for an entry that is unsound, and for a video that is listed twice."""
    seen: set[str] = set()
    for video in videos:
        check(video)
        if video.record.video_id in seen:
            raise check.error(video, "is listed twice")
        seen.add(video.record.video_id)


class EntryCheck:
    """Whether an index entry is sound by itself and fits the manifest."""

    def __init__(self, root: Path, manifest: Manifest | FeatureManifest) -> None:
        self._root, self._manifest = root, manifest
        self._sizes = {shard.name: shard.num_bytes for shard in manifest.shards}
        self._classes = frozenset(manifest.classes)

    def __call__(self, video: IndexedVideo | IndexedFeatures) -> None:
        """ValueError for an entry that is unsound."""
        if problem := self._problem(video):
            raise self.error(video, problem)

    def error(self, video: IndexedVideo | IndexedFeatures, problem: str) -> ValueError:
        """What to raise for a problem."""
        # An index may come from anyone: quoted, and cut short, an id cannot fill a terminal.
        name = repr(video.record.video_id[:80])
        return ValueError(f"{self._root / INDEX_NAME}: {name} {problem}; {rebuild_hint(self._root, self._manifest)}")

    def _problem(self, video: IndexedVideo | IndexedFeatures) -> str:
        """What is wrong with an entry; nothing where it is sound."""
        record = video.record
        if fault := id_fault(record.video_id):
            return f"is not an id: {fault}"
        if record.subset != self._manifest.subset:
            return f"belongs to subset {record.subset!r}, not to {self._manifest.subset!r}"
        if video.offset + video.num_bytes > self._sizes.get(video.shard, 0):
            return f"lies past the end of {video.shard}"
        seconds = [t for action in record.actions for t in (action.start_seconds, action.end_seconds)]
        if not all(map(math.isfinite, (video.samples_per_second, record.duration_seconds, *seconds))):
            return "has a time that is not finite"
        unknown = {action.label for action in record.actions} - self._classes
        return f"has labels {sorted(unknown)} that are not among the classes of {MANIFEST_NAME}" if unknown else ""
