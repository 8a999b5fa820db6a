"""Which video goes into which shard, and what became of it: kept beside the shards, so that a build can go on.

    .reports/plan.json                 groups of videos, in order; each becomes one shard (more, if it is too large)
    .reports/shard-000003.tar.json     where each video of the group is, or why it cannot be used

A video is known by its id and a fingerprint of what its pictures are made from. What it shows is no part of that, so
other annotations change no group. A new video, or one whose source changed, goes into new groups at the end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from re2tal.data.building.shard_folder import REPORTS, Listed
from re2tal.data.contract.manifest import (
    MANIFEST_NAME,
    IndexedVideo,
    Sha256,
    ShardFile,
    ShardName,
    StoredVideo,
    from_json,
    to_json,
)
from re2tal.files import write_atomically

PLAN_NAME = "plan.json"
NO_FILE = "there is no file of this name, or a link that leads nowhere"

Kind = Literal["shards build", "shards build --copy", "shards index"]
"""What makes the videos of a folder."""


@dataclass(frozen=True, slots=True)
class Item:
    """A video that is to be in the folder."""

    listed: Listed
    fingerprint: str
    """Of what its pictures are made from; empty where there is nothing to make them from."""
    num_bytes: int = 0
    """Of its source."""
    fault: str = NO_FILE
    """Why there is nothing."""
    terms: str = ""
    """What else decides whether it is refused: once it changes, a refused video is tried again."""
    modified_ns: int = 0
    """When its source was written last: a damaged one is made again once that changes. A fingerprint need not show
    that a hole in the middle of a file was filled."""

    @property
    def video_id(self) -> str:
        """Its id."""
        return self.listed.video_id


@dataclass(frozen=True, slots=True)
class Planned:
    """A video of a group."""

    video_id: str
    fingerprint: Sha256


@dataclass(frozen=True, slots=True)
class Group:
    """The videos of one shard."""

    name: ShardName
    videos: tuple[Planned, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All groups of a folder."""

    seed: int
    kind: Kind
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class StoredPictures:
    """Where a video is, and what there is to know of it besides its annotations."""

    video_id: str
    fingerprint: Sha256
    shard: ShardName
    offset: int
    num_bytes: int
    crc32: int
    video: StoredVideo
    seconds: float
    """How long the source lasts."""
    damage: str
    is_copy: bool
    modified_ns: int = 0
    """Of a damaged one."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A video that could not be made."""

    video_id: str
    fingerprint: Sha256
    terms: str
    reason: str


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What became of a group."""

    files: tuple[ShardFile, ...]
    videos: tuple[StoredPictures, ...]
    refused: tuple[Refused, ...]


def read_plan(root: Path) -> Plan | None:
    """The plan of a folder; None where there is none."""
    path = root / REPORTS / PLAN_NAME
    return from_json(Plan, path.read_bytes(), source=str(path)) if path.is_file() else None


def write_plan(root: Path, plan: Plan) -> None:
    """Write the plan of a folder."""
    write_atomically(root / REPORTS / PLAN_NAME, to_json(plan))


def read_report(root: Path, group: Group) -> GroupReport | None:
    """The report of a group whose shards are all there; one that is damaged, or of another group, is none."""
    path = root / REPORTS / f"{group.name}.json"
    if not path.is_file():
        return None
    try:
        report = from_json(GroupReport, path.read_bytes(), source=str(path))
    except ValueError:
        return None
    told = {(one.video_id, one.fingerprint) for one in report.videos}
    told |= {(one.video_id, one.fingerprint) for one in report.refused}
    # A report may be left from a group of this name in an earlier plan.
    if not told <= {(one.video_id, one.fingerprint) for one in group.videos}:
        return None
    for file in report.files:
        tar = root / file.name
        if not (tar.is_file() and tar.stat().st_size == file.num_bytes):
            return None
    return report


def write_report(root: Path, group: Group, report: GroupReport) -> None:
    """Write the report of a group."""
    write_atomically(root / REPORTS / f"{group.name}.json", to_json(report))


def adopt(root: Path, file: ShardFile, moved: Sequence[tuple[Path, IndexedVideo, IndexedVideo]]) -> None:
    """Let later builds know the videos of a tar that came from other folders: (folder, entry there, entry here)."""
    plans = {source: read_plan(source) for source in dict.fromkeys(source for source, _, _ in moved)}
    told = {
        (source, one.shard, one.offset): one
        for source, plan in plans.items()
        for group in (plan.groups if plan else ())
        if (report := read_report(source, group))
        for one in report.videos
    }
    found = [(told.get((source, there.shard, there.offset)), here) for source, there, here in moved]
    videos = tuple(replace(one, shard=file.name, offset=here.offset) for one, here in found if one)
    known = [plan for plan in plans.values() if plan]
    plan = read_plan(root)
    if plan is None and not (root / MANIFEST_NAME).is_file() and known:
        plan = replace(known[0], groups=())
    if plan is None or not videos:  # folders of an earlier version
        return
    group = Group(file.name, tuple(Planned(one.video_id, one.fingerprint) for one in videos))
    write_report(root, group, GroupReport((file,), videos, ()))
    write_plan(root, replace(plan, groups=(*plan.groups, group)))


def places(plan: Plan, reports: Mapping[str, GroupReport | None], items: Sequence[Item]) -> dict[str, Group]:
    """Video id -> the group that it is in, or will be in, as it is now; of several the last."""
    wanted = {item.video_id: item for item in items if item.fingerprint}
    found = {}
    for group in plan.groups:
        report = reports[group.name]
        stored = {(one.video_id, one.fingerprint): one for one in report.videos} if report else {}
        refused = {(one.video_id, one.fingerprint, one.terms) for one in report.refused} if report else set()
        for planned in group.videos:
            item = wanted.get(planned.video_id)
            if item is None or item.fingerprint != planned.fingerprint:
                continue
            key = item.video_id, item.fingerprint
            one = stored.get(key)
            # 0 where a report does not say when its source was written.
            is_there = one is not None and not (one.damage and one.modified_ns not in (0, item.modified_ns))
            if report is None or is_there or (*key, item.terms) in refused:
                found[item.video_id] = group
    return found


def extended(plan: Plan, items: Sequence[Item], *, first: int, max_bytes: int, per_shard: int | None) -> Plan:
    """The plan with groups for these videos, in an order that depends on the seed alone, numbered from `first`."""
    order = list(items)
    # Shards hold videos of all kinds then: training shuffles within a span only.
    random.Random(plan.seed).shuffle(order)
    groups = [
        Group(f"shard-{first + number:06d}.tar", tuple(Planned(one.video_id, one.fingerprint) for one in chosen))
        for number, chosen in enumerate(_filled(order, max_bytes=max_bytes, per_shard=per_shard))
    ]
    return replace(plan, groups=(*plan.groups, *groups))


def _filled(items: Sequence[Item], *, max_bytes: int, per_shard: int | None) -> Iterator[list[Item]]:
    """Stored videos are rarely larger than their sources, so groups of so many source bytes fit."""
    chosen: list[Item] = []
    num_bytes = 0
    for item in items:
        if chosen and (num_bytes + item.num_bytes > max_bytes or len(chosen) == per_shard):
            yield chosen
            chosen, num_bytes = [], 0
        chosen.append(item)
        num_bytes += item.num_bytes
    if chosen:
        yield chosen
