"""Give the videos of shard folders other annotations, subsets and durations: no picture is touched.

    index entries of all subsets + records of a file -> entries per subset -> index.jsonl and manifest.json of each

A video that changes its subset is copied, as its bytes are, into a new tar of the other folder. One that is listed no
longer stays in its tar and in .reports/unlisted.jsonl, so that a later file may list it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from re2tal.data.building.annotation_entries import misfit
from re2tal.data.building.annotations import Annotations
from re2tal.data.building.shard_folder import REPORTS, shards_in_use
from re2tal.data.building.shard_plan import adopt, read_plan
from re2tal.data.building.stored_videos import UNLISTED_NAME, AnySet, Entry, stored_videos, subset_folders
from re2tal.data.contract.commit import commit
from re2tal.data.contract.feature_manifest import (
    FeatureManifest,
    FeatureTotals,
    Packed,
    StepsPerVideo,
)
from re2tal.data.contract.folder import read_stretch
from re2tal.data.contract.manifest import (
    MANIFEST_NAME,
    DamagedVideo,
    IndexedVideo,
    Manifest,
    Rejection,
    ShardFile,
    Totals,
    to_json,
)
from re2tal.data.contract.members import read_content
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any
from re2tal.data.streaming.decode import DecodeError
from re2tal.files import atomic_file, sha256_of, write_atomically
from re2tal.structures import VideoRecord, find_subset
from re2tal.video_ids import composed

ABSENT = "its pictures are in none of these shards; add them with `re2tal shards build`"


@dataclass(slots=True)
class Annotated:
    """What becomes of the folder of a subset."""

    root: Path
    like: AnySet
    """The folder itself, or one beside it where it is new."""
    subset: str
    entries: list[Entry] = field(default_factory=list)
    moved: list[tuple[Path, Entry]] = field(default_factory=list)
    """Videos that come from another folder: its path, their entries with the new record."""
    rejected: list[Rejection] = field(default_factory=list)
    unlisted: list[Entry] = field(default_factory=list)
    """Videos in its tars that are not, or no longer, in its index."""
    gone: list[str] = field(default_factory=list)
    """Videos that it listed, and that the file does not."""
    damaged: dict[str, DamagedVideo] = field(default_factory=dict)
    """Of all folders, by video id."""
    num_changed: int = 0
    """Videos that stay, with another record."""


def annotate(folder: Path, annotations: Annotations, *, blocked: frozenset[str] = frozenset()) -> list[Annotated]:
    """Replace the annotations of a folder of subsets, or of a single subset; says what was done, folder by folder.

    Nothing is changed where this raises ValueError: for a subset that would be empty, and for a video that should go
    to another subset, where a single one is given. Each folder changes as a whole.
    """
    opened = [open_any(one) for one in subset_folders(folder)]
    stored, twice = stored_videos(opened)
    changes = {one.manifest.subset: Annotated(one.root, one, one.manifest.subset) for one in opened}
    damaged = {one.video_id: one for found in opened if isinstance(found, ShardSet) for one in found.manifest.damaged}
    is_single = (folder / MANIFEST_NAME).is_file()
    earlier = {one.video_id: one.reason for found in opened for one in found.manifest.rejected}
    earlier |= {video_id: _which([home for home, _ in all_of]) for video_id, all_of in twice.items()}
    # Of the records that belong here: those of other folders of the data set are none of our business.
    seen: set[str] = set()
    # Another program may write another Unicode form.
    as_here = {composed(video_id): video_id for video_id in (*stored, *twice)}
    listed = [one for found in annotations.subsets.values() for one in found if one.video_id not in blocked]
    records = [replace(one, video_id=as_here.get(composed(one.video_id), one.video_id)) for one in listed]
    for record in sorted(records, key=lambda one: one.video_id not in stored):  # a new subset begins with a video
        name = find_subset(record.subset, changes)
        home, entry = stored.get(record.video_id, (None, None))
        if is_single and name is None:
            if record.video_id in opened[0].by_id:
                raise ValueError(
                    f"{folder} holds {record.video_id!r}, which belongs to subset {record.subset!r} now; give the "
                    "folder of all subsets"
                )
            continue
        if name is None and record.video_id in twice:  # a folder that is not there yet would hold nothing of it
            name = twice[record.video_id][0][0].manifest.subset
        if name is None:
            if entry is None:
                continue
            name = record.subset
            changes[name] = Annotated(folder / name, opened[0], name)
        seen.add(record.video_id)
        _place(changes[name], home, entry, replace(record, subset=name), earlier)
    kept = {entry.record.video_id for change in changes.values() for entry in change.entries}
    for video_id, (home, entry) in stored.items():
        if video_id not in kept:
            changes[home.manifest.subset].unlisted.append(entry)
        if video_id not in seen and video_id in home.by_id:
            changes[home.manifest.subset].gone.append(video_id)
    for video_id, all_of in twice.items():
        for home, entry in all_of:
            changes[home.manifest.subset].unlisted.append(entry)
        if video_id not in seen:
            changes[all_of[0][0].manifest.subset].gone.append(video_id)
    # Everything is known before the first folder is written: an error leaves all of them as they were.
    _refuse_empty([*changes.values()], seen)
    # What moves is taken from its old folder first, and can be found there until it is in the new one.
    for change in sorted(changes.values(), key=lambda change: bool(change.moved)):
        change.damaged = damaged
        _write(change, annotations.classes)
    return [*changes.values()]


def _which(homes: Sequence[AnySet]) -> str:
    roots = " and in ".join(dict.fromkeys(str(one.root) for one in homes))
    return f"other pictures have its name in {roots}: which are meant is not known; rename one and build it again"


def _place(
    change: Annotated, home: AnySet | None, entry: Entry | None, record: VideoRecord, earlier: Mapping[str, str]
) -> None:
    if home is None or entry is None:
        change.rejected.append(Rejection(record.video_id, earlier.get(record.video_id, ABSENT)))
    elif why := _misfit(home, entry, record):
        change.rejected.append(Rejection(record.video_id, why))
    elif home.root == change.root:
        change.num_changed += entry.record != record
        change.entries.append(replace(entry, record=record))
    else:
        try:
            # Before it is moved: damaged bytes would get a new tar, with a checksum that fits.
            read_content(home, entry)
        except DecodeError as error:
            change.rejected.append(Rejection(record.video_id, str(error)))
        else:
            change.moved.append((home.root, replace(entry, record=record)))


def _misfit(shards: AnySet, entry: Entry, record: VideoRecord) -> str:
    """Why the stored video cannot be the annotated one."""
    was, now = entry.record.duration_seconds, record.duration_seconds
    # The same duration: nothing was measured anew, so nothing can disagree.
    if was == now:
        return ""
    if isinstance(entry, IndexedVideo):
        return misfit(entry.video_seconds, now)
    spec = shards.manifest.features if isinstance(shards, FeatureSet) else None
    if spec and isinstance(spec.grid, StepsPerVideo) and isinstance(spec.origin, Packed):
        return f"its steps divide {was:g} s, which are {now:g} s now; pack its features again"
    return misfit(was, now)


def _refuse_empty(changes: Sequence[Annotated], seen: set[str]) -> None:
    for change in changes:
        if not change.entries and not change.moved:
            raise ValueError(
                f"no video of subset {change.subset!r} would be left in {change.root} ({len(seen)} videos of the file "
                "belong to these shards); give the annotations of these videos, or remove that folder"
            )


def _write(change: Annotated, classes: tuple[str, ...]) -> None:
    change.root.mkdir(exist_ok=True)
    is_new = change.root != change.like.root
    files = {} if is_new else {file.name: file for file in change.like.manifest.shards}
    if change.moved:
        added, file = _moved(change)
        change.entries += added
        files[file.name] = file
    for name in {entry.shard for entry in change.entries} - files.keys():  # a tar of which no video was listed
        tar = change.root / name
        files[name] = ShardFile(name, tar.stat().st_size, sha256_of(tar), 1)
    used = shards_in_use([files[name] for name in sorted(files)], change.entries)
    place = {file.name: number for number, file in enumerate(used)}
    change.entries.sort(key=lambda entry: (place[entry.shard], entry.offset))
    if change.unlisted or (change.root / REPORTS / UNLISTED_NAME).is_file():
        write_atomically(change.root / REPORTS / UNLISTED_NAME, "".join(to_json(e) + "\n" for e in change.unlisted))
    entries: Any = change.entries
    commit(change.root, entries, lambda index_sha256: _manifest(change, used, classes, index_sha256))


def _manifest(
    change: Annotated, used: Sequence[ShardFile], classes: tuple[str, ...], index_sha256: str
) -> Manifest | FeatureManifest:
    manifest = change.like.manifest
    listed = {entry.record.video_id for entry in change.entries}
    num_bytes = sum(file.num_bytes for file in used)
    common: dict[str, Any] = {
        "subset": change.subset,
        "classes": classes,
        "rejected": tuple(change.rejected),
        "index_sha256": index_sha256,
        "shards": tuple(used),
    }
    if isinstance(manifest, FeatureManifest):
        steps = sum(entry.num_samples for entry in change.entries)
        return replace(manifest, **common, totals=FeatureTotals(len(listed), steps, num_bytes))
    seconds = sum(entry.video_seconds for entry in change.entries if isinstance(entry, IndexedVideo))
    frames = sum(entry.num_samples for entry in change.entries)
    return replace(
        manifest,
        **common,
        totals=Totals(len(listed), frames, seconds, num_bytes),
        damaged=tuple(one for video_id, one in change.damaged.items() if video_id in listed),
    )


def _moved(change: Annotated) -> tuple[list[Entry], ShardFile]:
    """Write the tar of the videos that come from other folders: the stretches of their tars, one after another."""
    plan = read_plan(change.root)
    # Above all numbers that are used or planned: a later build must not write over this tar.
    there = [int(path.name[6:12]) for path in change.root.glob("shard-*.tar")]
    there += [int(group.name[6:12]) for group in plan.groups] if plan else []
    tar = change.root / f"shard-{max(there, default=-1) + 1:06d}.tar"
    added: list[Entry] = []
    with atomic_file(tar) as file:
        for root, entry in change.moved:
            added.append(replace(entry, shard=tar.name, offset=file.tell()))
            file.write(read_stretch(root / entry.shard, entry))
        file.write(bytes(1024 + -(file.tell() + 1024) % 10240))  # as tar ends a file
    written = ShardFile(tar.name, tar.stat().st_size, sha256_of(tar), len(added))
    pairs = zip(change.moved, added, strict=True)
    adopt(
        change.root,
        written,
        [
            (root, there, here)
            for (root, there), here in pairs
            if isinstance(there, IndexedVideo) and isinstance(here, IndexedVideo)
        ],
    )
    return added, written
