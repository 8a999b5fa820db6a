"""Many videos into shards by many workers: here what makes them is a stand-in that takes its time."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from data.files import encoding

from re2tal.data.building.annotate import annotate
from re2tal.data.building.annotations import Annotations
from re2tal.data.building.make_videos import Made
from re2tal.data.building.named_files import videos_in
from re2tal.data.building.shard_folder import fingerprint
from re2tal.data.building.shard_plan import Item
from re2tal.data.building.video_folder import VideoFolder
from re2tal.data.contract.manifest import SourceVideo, StoredVideo
from re2tal.data.contract.members import read_content
from re2tal.data.contract.shards import open_shards
from re2tal.structures import Action, VideoRecord

SOURCE = SourceVideo("v.mp4", "0" * 64, "h264", 30, 2.0)


def items(count: int, *, label: str = "x") -> list[Item]:
    return [
        Item(VideoRecord(f"v{n}", "training", 2.0, (Action(0.5, 1.0, label),)), fingerprint(f"v{n}"), num_bytes=4000)
        for n in range(count)
    ]


def make(listed, path: Path, isolated) -> Made:
    time.sleep(random.random() / 100)
    if listed.video_id == "v3":
        raise ValueError("v3 is no good")
    path.write_bytes(listed.video_id.encode() * random.Random(listed.video_id).randrange(1000, 3000))
    return Made(StoredVideo(30, 15.0, 64, 48, SOURCE), seconds=2.0)


def folder(root: Path, **options) -> VideoFolder:
    settings = {"dataset": "own", "encoding": encoding(fps=15)}
    return VideoFolder(root, "training", settings, ("x", "y"), **{"shard_bytes": 40_000, **options})


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_bytes_depend_on_neither_workers_nor_parts(tmp_path):
    roots = [tmp_path / name for name in ("one", "five", "parts")]
    folder(roots[0]).build(items(50), make)
    folder(roots[1], workers=5).build(items(50), make)
    for part in (2, 0, 1):
        built = folder(roots[2], workers=2, part_index=part, num_parts=3).build(items(50), make)
        assert built.is_complete == (part == 1)
    assert contents(roots[0]) == contents(roots[1]) == contents(roots[2])
    shards = open_shards(roots[0])
    assert (len(shards.videos), [one.reason for one in shards.manifest.rejected]) == (49, ["v3 is no good"])
    assert all(read_content(shards, one).startswith(one.record.video_id.encode()) for one in shards.videos)
    assert all(shard.num_bytes <= 40_000 for shard in shards.manifest.shards)


def test_all_workers_work_at_one_shard(tmp_path):
    together = threading.Barrier(4)

    def wait_for_the_others(listed, path, isolated):
        together.wait(timeout=20)
        return make(listed, path, isolated)

    built = folder(tmp_path, workers=4, shard_bytes=10**9).build(items(3) + items(5)[4:], wait_for_the_others)
    assert (built.num_shards, built.is_complete) == (1, True)


def test_what_is_listed_later_or_no_longer_leaves_the_other_shards_alone(tmp_path):
    folder(tmp_path).build(items(20), make)
    before = contents(tmp_path)
    made = []

    def noting(listed, path, isolated):
        made.append(listed.video_id)
        return make(listed, path, isolated)

    folder(tmp_path, workers=3).build(items(22, label="y")[1:], noting)
    assert sorted(made) == ["v20", "v21"]
    shards = open_shards(tmp_path)
    assert sorted(shards.by_id) == sorted({f"v{n}" for n in range(1, 22)} - {"v3"})
    assert {action.label for video in shards.videos for action in video.record.actions} == {"y"}
    after = contents(tmp_path)
    assert all(after[name] == content for name, content in before.items() if name.endswith(".tar"))
    folder(tmp_path).build(items(20), pytest.fail)
    assert {name: content for name, content in contents(tmp_path).items() if name in before} == before | {
        ".reports/plan.json": contents(tmp_path)[".reports/plan.json"]
    }


def test_a_worker_that_fails_ends_the_build_and_what_was_finished_is_kept(tmp_path):
    def full(listed, path, isolated):
        if listed.video_id == "v7":
            raise OSError(28, "No space left on device")
        return make(listed, path, isolated)

    with pytest.raises(OSError, match="No space left"):
        folder(tmp_path, workers=3).build(items(50), full)
    assert not [*tmp_path.glob(".encoded-*")]
    kept = {name for name in contents(tmp_path) if name.endswith(".tar")}
    made = []
    folder(tmp_path, workers=3).build(items(50), lambda one, *rest: (made.append(one.video_id), make(one, *rest))[1])
    assert "v7" in made
    assert len(made) < 50 or not kept
    folder(tmp_path / "other").build(items(50), make)
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith("other/")} == contents(tmp_path / "other")


def test_a_video_that_moved_to_another_subset_is_not_made_again(tmp_path):
    folder(tmp_path / "training").build(items(9), make)
    records = [item.listed for item in items(9)]
    moved = [replace(one, subset="validation") if one.video_id in ("v2", "v8") else one for one in records]
    subsets = {name: tuple(one for one in moved if one.subset == name) for name in ("training", "validation")}
    annotate(tmp_path, Annotations(subsets, ("x",)))
    for name, wanted in subsets.items():
        known = [replace(item, listed=one) for item, one in zip(items(9), moved, strict=True) if one in wanted]
        replace(folder(tmp_path / name), subset=name).build(known, pytest.fail)
        assert sorted(open_shards(tmp_path / name).by_id) == sorted({one.video_id for one in wanted} - {"v3"})
    shards = open_shards(tmp_path / "validation")
    assert all(read_content(shards, one).startswith(one.record.video_id.encode()) for one in shards.videos)


def test_damaged_and_refused_videos_are_made_again_once_their_file_was_written_again(tmp_path):
    """The blocks that a fingerprint reads may all lie beside the hole that was filled."""
    made = []

    def holed(listed, path, isolated):
        made.append(listed.video_id)
        return replace(make(listed, path, isolated), damage="a hole" if listed.video_id == "v1" else "")

    first = [replace(item, terms="1", modified_ns=1) for item in items(5)]
    folder(tmp_path).build(first, holed)
    folder(tmp_path).build(first, pytest.fail)
    made.clear()
    again = [replace(item, terms="2", modified_ns=2) for item in first]
    folder(tmp_path).build(again, lambda one, *rest: (made.append(one.video_id), make(one, *rest))[1])
    assert sorted(made) == ["v1", "v3"]
    assert open_shards(tmp_path).manifest.damaged == ()
    folder(tmp_path).build(again, pytest.fail)


def test_linked_folders_of_videos_are_looked_at_once(tmp_path):
    for path in (tmp_path / "disk" / "b.mp4", tmp_path / "videos" / "a.mp4", tmp_path / "videos" / ".cache" / "c.mp4"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    videos = tmp_path / "videos"
    (videos / "linked").symlink_to(tmp_path / "disk")
    (videos / "linked again").symlink_to(tmp_path / "disk")
    files, odd = videos_in(videos)
    assert files == [videos / "a.mp4", videos / "linked" / "b.mp4"]
    assert odd == [f"{videos}/linked again is not looked at: by a link it is the folder {videos}/linked"]
