"""Shard folders that are there already get other annotations, or are joined; no picture is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from re2tal.data.building.annotate import Annotated, annotate
from re2tal.data.building.annotation_entries import UNKNOWN_SECONDS
from re2tal.data.building.annotations import read_annotations
from re2tal.data.building.catalog import DATASETS
from re2tal.data.building.labels import read_class_list
from re2tal.data.building.merge import merge_shards, merged_classes, same_pictures, skipped_videos
from re2tal.data.building.stored_videos import Entry, stored_videos, subset_folders
from re2tal.data.building.subset_names import rename_subsets
from re2tal.data.contract.manifest import MANIFEST_NAME
from re2tal.data.contract.shards import ShardSet, open_any, open_shards
from re2tal.runs.exit_status import TOO_MANY_REJECTED
from re2tal.runs.shard_building import for_each, shards_locked
from re2tal.runs.shard_listing import describe, print_some
from re2tal.video_ids import composed


def relabel(
    shards: Path,
    annotations: Path,
    *,
    classes: Path | None,
    invalid_segments: Literal["refuse", "drop"],
    fix_labels: bool,
    max_rejected: float,
) -> int:
    """Replace the annotations of shard folders; gives the exit status."""
    first, seconds = _stored_seconds(shards)
    spec = DATASETS.get(first)

    def measured(video_id: str) -> float:
        return seconds.get(composed(video_id), UNKNOWN_SECONDS)  # what is in no shard is left out for that

    # A list that is given, else the data set's own order; else that of the file.
    names = read_class_list(classes) if classes else spec.classes if spec else None
    read = read_annotations(
        annotations, classes=names, invalid_segments=invalid_segments, duration_of=measured, fix_labels=fix_labels
    )
    if spec:
        read = rename_subsets(read, spec.subset_pairs)
    for note in read.notes:
        print(f"{annotations}: {note}")
    with ExitStack() as locks:  # two that write at once would leave the index of one beside the manifest of the other
        for one in subset_folders(shards):
            locks.enter_context(shards_locked(one))
        changes = annotate(shards, read, blocked=spec.blocked if spec else frozenset())
    return max(_report(change, max_rejected) for change in changes)


def _stored_seconds(folder: Path) -> tuple[str, dict[str, float]]:
    """(name of the data set, seconds of each video, of those too that no longer are listed)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that `re2tal shards build --out` wrote")
    opened = [open_any(one) for one in subset_folders(folder)]
    stored, _ = stored_videos(opened)
    return opened[0].manifest.dataset, {composed(video_id): _seconds(entry) for video_id, (_, entry) in stored.items()}


def _seconds(entry: Entry) -> float:
    seconds, known = entry.num_samples / entry.samples_per_second, entry.record.duration_seconds
    # What was measured when it was built is of the source, and not whole frames: to say the same again is no change.
    return known if abs(known - seconds) <= 1 / entry.samples_per_second else seconds


def _report(change: Annotated, max_rejected: float) -> int:
    """Print what became of a folder; gives the exit status."""
    print_some([f"rejected {one.video_id}: {one.reason}" for one in change.rejected], more="videos")
    print_some([f"listed no longer: {video_id}" for video_id in change.gone], more="videos")
    print(
        f"{change.subset}: {change.num_changed} of {len(change.entries)} videos have other annotations, "
        f"{len(change.moved)} came from another subset, {len(change.gone)} are listed no longer, "
        f"{len(change.rejected)} are left out"
    )
    describe([change.root])
    # Of those that the file lists, in the shards or not.
    share = len(change.rejected) / (len(change.rejected) + len(change.entries))
    return TOO_MANY_REJECTED if share > max_rejected else 0


def merge(folders: Sequence[Path], *, out: Path) -> int:
    """Join shard folders, subset by subset; gives the exit status."""
    opened = [open_shards(root) for folder in folders for root in subset_folders(folder)]
    if len(opened) < 2:
        raise ValueError(f"{len(opened)} folders to merge; give two or more")
    skipped = skipped_videos(opened)
    classes = merged_classes(opened)
    subsets: dict[str, list[ShardSet]] = {}
    for shards in opened:
        subsets.setdefault(shards.subset, []).append(shards)
    # Before the first subset is merged.
    if taken := [str(out / name) for name in subsets if (out / name / MANIFEST_NAME).is_file()]:
        raise ValueError(f"{taken[0]} holds shards already; give another --out")
    print_some(same_pictures(opened), more="such videos")
    # Without a reason it is the same video once more, which is no loss.
    twice = [f"{name!r} of {root}" for root, names in skipped.items() for name, why in names.items() if not why]
    print_some([f"not taken again: {one}" for one in twice], more="such videos")

    def one(name: str) -> int:
        first, *others = subsets[name]
        for other in others:
            if other.manifest.encoding != first.manifest.encoding:
                print(f"{other.root} has another encoding than {first.root}; the manifest will name the first")
        manifest = merge_shards([first, *others], out / name, classes=classes, skipped=skipped)
        print_some([f"rejected {one.video_id}: {one.reason}" for one in manifest.rejected], more="videos")
        return 0

    status = for_each(list(subsets), one)
    return max(status, describe([out / name for name in subsets]))
