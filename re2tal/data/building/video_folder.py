"""A shard folder of videos: whatever is there already is kept, the rest is made by all workers at once.

    listed videos -> plan (shard_plan) -> videos that are missing, each by any worker -> tar and report of each group
                  -> when the last group is there: index.jsonl and manifest.json, with the annotations of today

The bytes depend on neither the number of workers nor the number of parts. Labels are in the index alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from re2tal.data.building.annotation_entries import misfit
from re2tal.data.building.content import crc32_of
from re2tal.data.building.make_videos import SCRATCH, Made, Make, OnVideo, Result, Workshop, tools
from re2tal.data.building.shard_folder import (
    REPORTS,
    BuiltSubset,
    NothingUsableError,
    refuse_other_settings,
    shards_in_use,
    totals_of,
)
from re2tal.data.building.shard_plan import (
    PLAN_NAME,
    Group,
    GroupReport,
    Item,
    Kind,
    Plan,
    Refused,
    StoredPictures,
    extended,
    places,
    read_plan,
    read_report,
    write_plan,
    write_report,
)
from re2tal.data.contract.commit import commit
from re2tal.data.contract.manifest import (
    MANIFEST_NAME,
    DamagedVideo,
    IndexedVideo,
    Manifest,
    Rejection,
    ShardFile,
    read_manifest,
    to_json,
)
from re2tal.data.contract.shards import Pair, write_tar
from re2tal.files import sha256_of
from re2tal.structures import VideoRecord

SHARD_BYTES = 2_000_000_000
"""How large a shard may be unless the user says otherwise."""
_BLOCK = 512
_TAR_END = 10240


@dataclass(frozen=True, slots=True)
class VideoFolder:
    """Where the shards of a subset are written, and what they have in common."""

    root: Path
    subset: str
    settings: Mapping[str, Any]
    """Fields of the manifest that a folder may not change."""
    classes: tuple[str, ...]
    seed: int = 0
    """Of the order of the videos."""
    shard_bytes: int = SHARD_BYTES
    """A shard of more than one video is not larger."""
    per_shard: int | None = None
    """Nor does it hold more videos; None: any number."""
    kind: Kind = "shards build"
    max_damaged: float = 1.0
    """Share of a video's frames that may be damaged; videos with more are left out."""
    workers: int = 1
    """Videos that are made at a time."""
    part_index: int = 0
    """This run makes the groups whose number is `part_index` modulo `num_parts`."""
    num_parts: int = 1

    def build(
        self,
        items: Sequence[Item],
        make: Make,
        *,
        on_start: Callable[[int], None] = lambda num_videos: None,
        on_video: OnVideo = lambda listed, why: None,
    ) -> BuiltSubset:
        """Make what is missing of this part; the run that completes the folder writes the manifest.

        Raises ValueError where the folder holds shards of other settings or of an earlier version, and where no video
        can be used.
        """
        (self.root / REPORTS).mkdir(parents=True, exist_ok=True)
        self._check_settings()
        plan, reports = self._plan(items)
        todo = [group for group in plan.groups[self.part_index :: self.num_parts] if reports[group.name] is None]
        if todo:
            self._forget_manifest({group.name for group in todo})
            on_start(sum(len(group.videos) for group in todo))
            Workshop(self.root, self.workers, self.write, items, make, on_video).run(todo)
            reports = {group.name: read_report(self.root, group) for group in plan.groups}
        missing = sum(report is None for report in reports.values())
        found = self._found(items, plan, reports)
        if not missing:
            if not found.entries:
                raise NothingUsableError(found.rejected)
            self._finish(found)
            self._remove_leftovers(plan, {file.name for file in found.files})
        rejected, damaged = tuple(found.rejected), tuple(found.damaged)
        return BuiltSubset(
            self.root, len(items), len(plan.groups), missing, rejected, damaged, num_copies=found.num_copies
        )

    def _check_settings(self) -> None:
        path = self.root / MANIFEST_NAME
        if not path.is_file():
            return
        plan = read_plan(self.root)
        refuse_other_settings(self.root, read_manifest(path, Manifest), {**self.settings, "seed": self.seed})
        if plan is None:
            raise ValueError(
                f"{self.root} has no {REPORTS}/{PLAN_NAME}: an earlier version built it, or another command, and what "
                "its videos were made from is not known. To change annotations, use `re2tal shards annotate`; to "
                "encode all videos again, give another --out"
            )
        if plan.kind != self.kind:
            raise ValueError(
                f"{self.root} was built with `re2tal {plan.kind}`, now it is `re2tal {self.kind}`; give another --out, "
                "or delete that folder"
            )

    def _plan(self, items: Sequence[Item]) -> tuple[Plan, dict[str, GroupReport | None]]:
        """The groups that are of use still, and new ones for what is in none of them."""
        had = read_plan(self.root)
        if had is None or (had.seed, had.kind) != (self.seed, self.kind):
            had = Plan(self.seed, self.kind, ())
        reports = {group.name: read_report(self.root, group) for group in had.groups}
        placed = places(had, reports, items)
        used = {group.name for group in placed.values()}
        kept = replace(had, groups=tuple(group for group in had.groups if group.name in used))
        new = [item for item in items if item.fingerprint and item.video_id not in placed]
        names = used | self._shards_of_manifest()
        first = max((int(name[6:12]) + 1 for name in names), default=0)
        plan = extended(kept, new, first=first, max_bytes=self.shard_bytes, per_shard=self.per_shard)
        if plan != had or not (self.root / REPORTS / PLAN_NAME).is_file():
            write_plan(self.root, plan)
        return plan, {group.name: reports.get(group.name) for group in plan.groups}

    def _shards_of_manifest(self) -> set[str]:
        path = self.root / MANIFEST_NAME
        return {shard.name for shard in read_manifest(path, Manifest).shards} if path.is_file() else set()

    def _forget_manifest(self, names: set[str]) -> None:
        """Where a shard is made again, what the manifest says of it holds no longer."""
        if any(_group_name(shard) in names for shard in self._shards_of_manifest()):
            (self.root / MANIFEST_NAME).unlink(missing_ok=True)

    def write(self, group: Group, results: Sequence[Result]) -> None:
        """Write the tars of a group, most often one, and its report."""
        made = [(item, one, path) for item, one, path in results if isinstance(one, Made)]
        files: list[ShardFile] = []
        videos: list[StoredPictures] = []
        for number, part in enumerate(self._split(made)):
            name = group.name if number == 0 else group.name.replace(".tar", f"-{number}.tar")
            sums: list[int] = []
            tar_places = write_tar(self.root / name, _pairs(part, sums))
            tar = self.root / name
            files.append(ShardFile(name, tar.stat().st_size, sha256_of(tar), len(part)))
            for (item, one, _), crc32, (offset, num_bytes) in zip(part, sums, tar_places, strict=True):
                kept = item.video_id, item.fingerprint, name, offset, num_bytes, crc32
                modified_ns = item.modified_ns if one.damage else 0
                videos.append(StoredPictures(*kept, one.description, one.seconds, one.damage, one.is_copy, modified_ns))
        refused = tuple(one for _, one, _ in results if isinstance(one, Refused))
        write_report(self.root, group, GroupReport(tuple(files), tuple(videos), refused))

    def _split(self, made: Sequence[tuple[Item, Made, Path]]) -> Iterator[list[tuple[Item, Made, Path]]]:
        part: list[tuple[Item, Made, Path]] = []
        num_bytes = _TAR_END
        for one in made:
            sizes = len(to_json(one[1].description)), one[2].stat().st_size
            added = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes)
            if part and num_bytes + added > self.shard_bytes:
                yield part
                part, num_bytes = [], _TAR_END
            part.append(one)
            num_bytes += added
        if part:
            yield part

    def _found(self, items: Sequence[Item], plan: Plan, reports: Mapping[str, GroupReport | None]) -> _Found:
        """What is known of the listed videos."""
        placed = places(plan, reports, items)
        by_id = {item.video_id: item for item in items}
        found = _Found()
        reasons = {item.video_id: item.fault for item in items if not item.fingerprint}
        files: list[ShardFile] = []
        for group in plan.groups:
            if (report := reports[group.name]) is None:
                continue
            files += report.files
            for refused in report.refused:
                if placed.get(refused.video_id) is group:
                    reasons[refused.video_id] = refused.reason
            for one in report.videos:
                if placed.get(one.video_id) is not group:
                    continue
                listed = by_id[one.video_id].listed
                record = listed if isinstance(listed, VideoRecord) else listed.lasting(one.seconds)
                if why := misfit(one.seconds, record.duration_seconds) or self._too_damaged(one):
                    reasons[one.video_id] = why
                else:
                    found.add(one, record)
        if None not in reports.values() and len(placed) + sum(not item.fingerprint for item in items) < len(items):
            raise ValueError(f"{self.root}: parts of this build had other videos; run the build once without --part")
        found.files = shards_in_use(files, found.entries)
        found.rejected = [
            Rejection(item.video_id, reasons[item.video_id]) for item in items if item.video_id in reasons
        ]
        return found

    def _too_damaged(self, one: StoredPictures) -> str:
        if one.video.damaged_share <= self.max_damaged:
            return ""
        return f"it is damaged: {one.damage}; replace the file, or allow more with --max-damaged"

    def _finish(self, found: _Found) -> None:
        """Write index and manifest; whoever finds all groups there may do it, and writes the same bytes."""
        commit(
            self.root,
            found.entries,
            lambda index_sha256: Manifest(
                format="re2tal-shards",
                version=1,
                subset=self.subset,
                classes=self.classes,
                seed=self.seed,
                tools=tools(),
                totals=totals_of(found.entries, found.files),
                rejected=tuple(found.rejected),
                index_sha256=index_sha256,
                shards=tuple(found.files),
                damaged=tuple(found.damaged),
                **self.settings,
            ),
        )

    def _remove_leftovers(self, plan: Plan, shards: set[str]) -> None:
        """Remove what killed builds, and videos that are listed no longer, left in a complete folder."""
        for path in (*self.root.glob("shard-*.tar"), *self.root.glob(".shard-*.tmp")):
            if path.name not in shards and _group_name(path.name) not in shards:
                path.unlink(missing_ok=True)
        for path in self.root.glob(f"{SCRATCH}*"):
            shutil.rmtree(path, ignore_errors=True)
        names = {f"{group.name}.json" for group in plan.groups} | {PLAN_NAME}
        for path in (self.root / REPORTS).glob("*.json"):
            if path.name not in names:
                path.unlink(missing_ok=True)


@dataclass(slots=True)
class _Found:
    """What is known of the listed videos."""

    entries: list[IndexedVideo] = field(default_factory=list)
    files: list[ShardFile] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    damaged: list[DamagedVideo] = field(default_factory=list)
    num_copies: int = 0

    def add(self, one: StoredPictures, record: VideoRecord) -> None:
        """A video that can be used."""
        video = one.video
        pictures = video.num_frames, video.fps, video.width, video.height, one.crc32, video.damaged_share
        self.entries.append(IndexedVideo(record, one.shard, one.offset, one.num_bytes, *pictures))
        self.num_copies += one.is_copy
        if one.damage:
            self.damaged.append(DamagedVideo(record.video_id, one.damage))


def _pairs(part: Sequence[tuple[Item, Made, Path]], sums: list[int]) -> Iterator[Pair]:
    for item, made, path in part:
        sums.append(crc32_of(path))
        yield Pair(item.video_id, to_json(made.description).encode(), path)


def _group_name(shard: str) -> str:
    """The name of the group that a shard belongs to: that of its first shard."""
    return f"{shard[:12]}.tar"
