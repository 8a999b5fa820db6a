"""Build real shard folders from real files; the processes that encode are started, so there are few builds."""

import itertools
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from data.files import cut_short, encoding, write_sound, write_video
from data.numbered import read_numbers
from webdataset import WebDataset

from re2tal.data.building.annotations import Annotations, read_annotations
from re2tal.data.building.build import BuildConfig, build_shards, find_sources, list_items
from re2tal.data.building.copy_video import check_as_it_is, mp4_of
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.named_files import Chosen, NamedFiles
from re2tal.data.building.probe import probe_video
from re2tal.data.building.shard_plan import Item, Plan, extended
from re2tal.data.contract.manifest import INDEX_NAME, MANIFEST_NAME
from re2tal.data.contract.members import read_content, read_video
from re2tal.data.contract.shards import open_shards
from re2tal.data.contract.verify import damage
from re2tal.data.streaming.decode import decode_frames
from re2tal.runs.shard_building import Build, build
from re2tal.runs.shard_listing import report_built
from re2tal.structures import Action, VideoRecord

CONFIG = BuildConfig(dataset="own", encoding=encoding(fps=15), videos_per_shard=3)
GOOD = {"a": 30, "b": 24, "c-1": 30, "_d": 25, "e": 30}
BAD = {
    "cut": "is cut short: its header promises 300 frames",
    "gone": "there is no file of this name",
    "long": "long.mp4: it lasts 2.00 s, the annotation file says 9.00 s",
    "mute": "mute.mp4 has no video stream, only audio",
    "text": "text.mkv cannot be read as a video",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for video_id, rate in GOOD.items():
        write_video(folder / f"v_{video_id}.mp4", num_frames=2 * rate, rate=rate)
    whole = write_video(folder / "whole.mp4", num_frames=300, container_options={"movflags": "faststart"})
    cut_short(whole, folder / "cut.mp4", share=0.6)
    write_video(folder / "long.mp4")
    write_sound(folder / "mute.mp4")
    (folder / "text.mkv").write_text("no video\n" * 100)
    return folder


@pytest.fixture(scope="module")
def annotations(videos) -> Annotations:
    database = {
        video_id: {
            "subset": "Training",
            "duration": 9.0 if video_id == "long" else 2.0,
            "annotations": [{"segment": [0.5, 1.5], "label": "run"}],
        }
        for video_id in sorted([*GOOD, *BAD])
    }
    path = videos / "annotations.json"
    path.write_text(json.dumps({"database": database}))
    return read_annotations(path)


@pytest.fixture(scope="module")
def built(videos, annotations, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    seen = []
    result = build_shards(
        annotations,
        videos=videos,
        out=out,
        subset="training",
        config=CONFIG,
        on_video=lambda record, rejection: seen.append((record.video_id, rejection is None)),
    )
    return result, sorted(seen)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copy(built, tmp_path) -> Path:
    """A copy of the built folder's parent, to be changed."""
    return Path(shutil.copytree(built[0].folder.parent, tmp_path / "copy"))


def test_every_good_video_is_stored_frame_by_frame(built):
    shards = open_shards(built[0].folder)
    assert sorted(shards.by_id) == sorted(GOOD)
    assert (shards.classes, shards.subset) == (("run",), "training")
    for video_id, rate in GOOD.items():
        video = shards.by_id[video_id]
        assert video.record == VideoRecord(video_id, "training", 2.0, (Action(0.5, 1.5, "run"),))
        assert (video.num_frames, video.fps, video.width, video.height) == (30, 15.0, 64, 48)
        mp4 = read_content(shards, video)
        shown = read_numbers(decode_frames(mp4, range(30)).numpy())
        assert max(abs(number / rate - i / 15) for i, number in enumerate(shown)) <= 0.5 / rate + 1e-6


def test_every_bad_video_is_left_out_with_its_reason(built):
    result, seen = built
    assert result.is_complete
    assert result.rejected_share == 0.5
    assert open_shards(result.folder).manifest.rejected == result.rejected
    reasons = {rejection.video_id: rejection.reason for rejection in result.rejected}
    assert sorted(reasons) == sorted(BAD)
    for video_id, reason in BAD.items():
        assert reason in reasons[video_id]
        assert "/" not in reasons[video_id], "a manifest names no folder of the machine that built it"
    with_file = set(BAD) - {"gone"}
    assert seen == sorted([(video_id, True) for video_id in GOOD] + [(video_id, False) for video_id in with_file])


def test_a_built_folder_is_undamaged_and_holds_nothing_else(built):
    folder = built[0].folder
    shards = open_shards(folder)
    assert list(damage(shards)) == []
    listed = {shard.name for shard in shards.manifest.shards} | {INDEX_NAME, MANIFEST_NAME, ".reports"}
    listed.add(f"index.{shards.manifest.index_sha256[:16]}.npy")
    assert {path.name for path in folder.iterdir()} == listed


def test_running_again_changes_nothing_and_encodes_nothing(videos, annotations, built, copy):
    before = contents(copy)
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("shard-*.tar")}
    build_shards(annotations, videos=videos, out=copy, subset="training", config=CONFIG, on_video=pytest.fail)
    assert contents(copy) == before
    assert times == {path: path.stat().st_mtime_ns for path in copy.rglob("shard-*.tar")}


def test_a_stopped_build_goes_on_to_the_same_bytes(videos, annotations, built, copy):
    before = contents(copy)
    folder = copy / "training"
    (folder / MANIFEST_NAME).unlink()
    (folder / INDEX_NAME).unlink()
    (folder / "shard-000001.tar").unlink()
    (folder / ".shard-000001.tar.123.tmp").write_bytes(b"what a killed build left")
    encoded = []
    build_shards(
        annotations,
        videos=videos,
        out=copy,
        subset="training",
        config=CONFIG,
        on_video=lambda record, rejection: encoded.append(record.video_id),
    )
    assert len(encoded) == 3
    assert contents(copy) == before


def test_parts_on_several_machines_give_the_same_bytes(videos, annotations, built, tmp_path):
    def build(part_index: int):
        config = replace(CONFIG, part_index=part_index, num_parts=2, workers=2)
        return build_shards(annotations, videos=videos, out=tmp_path, subset="training", config=config)

    first = build(1)
    assert (first.is_complete, first.num_shards, first.num_missing_shards) == (False, 3, 2)
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        open_shards(first.folder)
    assert build(0).is_complete
    assert contents(tmp_path / "training") == contents(built[0].folder)


def test_a_video_that_turns_up_later_gets_a_shard_of_its_own(videos, annotations, built, copy, tmp_path):
    before = contents(copy / "training")
    more = Path(shutil.copytree(videos, tmp_path / "more"))
    write_video(more / "gone.mp4")
    build_shards(annotations, videos=more, out=copy, subset="training", config=CONFIG)
    after = contents(copy / "training")
    changed = {name for name in after if after[name] != before.get(name) and name.endswith(".tar")}
    assert sorted(open_shards(copy / "training").by_id) == sorted([*GOOD, "gone"])
    assert changed == {"shard-000003.tar"}
    assert list(damage(open_shards(copy / "training"))) == []


def test_other_annotations_encode_nothing_and_change_no_tar(videos, built, copy, tmp_path):
    before = contents(copy / "training")
    entry = {"subset": "training", "duration": 2.0, "annotations": [{"segment": [0.6, 1.2], "label": "jump"}]}
    (tmp_path / "a.json").write_text(json.dumps({"database": dict.fromkeys(("a", "b", "c-1", "long", "cut"), entry)}))
    made = []
    result = build_shards(
        read_annotations(tmp_path / "a.json"),
        videos=videos,
        out=copy,
        subset="training",
        config=CONFIG,
        on_video=lambda record, rejection: made.append(record.video_id),
    )
    after = contents(copy / "training")
    shards = open_shards(copy / "training")
    assert made == ["long"], "it was refused for a duration that is another one now"
    assert {name for name in after if name.endswith(".tar") and after[name] != before.get(name)} == {"shard-000003.tar"}
    assert {k: v.record.actions for k, v in shards.by_id.items()} == dict.fromkeys(
        ("a", "b", "c-1", "long"), (Action(0.6, 1.2, "jump"),)
    )
    assert (shards.classes, [one.video_id for one in result.rejected]) == (("jump",), ["cut"])
    assert list(damage(shards)) == []


def test_a_source_that_changed_is_encoded_again_though_its_size_is_the_same(videos, annotations, built, copy, tmp_path):
    changed = Path(shutil.copytree(videos, tmp_path / "changed"))
    path = changed / "v_a.mp4"
    content = bytearray(path.read_bytes())
    place = content.index(b"Lavf")  # a tag that no picture depends on
    content[place : place + 4] = b"lavf"
    path.write_bytes(content)
    made = []
    build_shards(
        annotations,
        videos=changed,
        out=copy,
        subset="training",
        config=CONFIG,
        on_video=lambda record, rejection: made.append(record.video_id),
    )
    assert made == ["a"]
    assert sorted(open_shards(copy / "training").by_id) == sorted(GOOD)
    assert open_shards(copy / "training").by_id["a"].shard == "shard-000003.tar"


def test_shards_are_bounded_by_bytes_and_the_same_for_any_number_of_workers(videos, annotations, tmp_path):
    config = replace(CONFIG, blocked=frozenset(BAD), videos_per_shard=None)
    folders = []
    for workers in (1, 3):
        one = replace(config, shard_bytes=24_000, workers=workers)
        folders.append(
            build_shards(annotations, videos=videos, out=tmp_path / f"{workers}", subset="training", config=one)
        )
    assert contents(folders[0].folder) == contents(folders[1].folder)
    shards = open_shards(folders[0].folder)
    assert len(shards.videos) == len(GOOD)
    assert 1 < len(shards.manifest.shards) < len(GOOD)
    assert all(shard.num_bytes <= 24_000 for shard in shards.manifest.shards)
    assert list(damage(shards)) == []


def test_a_shard_that_turns_out_too_large_is_divided(videos, annotations, tmp_path):
    config = replace(CONFIG, blocked=frozenset(BAD), videos_per_shard=None, encoding=replace(CONFIG.encoding, crf=0))
    sizes = [(videos / f"v_{video_id}.mp4").stat().st_size for video_id in GOOD]
    config = replace(config, shard_bytes=sum(sizes))  # all in one group, by the sizes of the sources
    built = build_shards(annotations, videos=videos, out=tmp_path, subset="training", config=config)
    shards = open_shards(built.folder)
    names = [shard.name for shard in shards.manifest.shards]
    assert names[:2] == ["shard-000000.tar", "shard-000000-1.tar"]
    assert all(shard.num_bytes <= sum(sizes) or shard.videos == 1 for shard in shards.manifest.shards)
    assert sorted(shards.by_id) == sorted(GOOD)
    before = contents(built.folder)
    build_shards(annotations, videos=videos, out=tmp_path, subset="training", config=config, on_video=pytest.fail)
    assert contents(built.folder) == before


def test_a_folder_of_an_earlier_version_is_not_encoded_again_without_a_word(videos, annotations, built, copy):
    (copy / "training" / ".reports" / "plan.json").unlink()
    before = contents(copy)
    with pytest.raises(ValueError, match=r"has no \.reports/plan\.json: an earlier version built it.*shards annotate"):
        build_shards(annotations, videos=videos, out=copy, subset="training", config=CONFIG)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": encoding(fps=30)}, "was built with encoding .*15.0.* now it is .*30.0"),
        ({"dataset": "demo"}, "was built with dataset own, now it is demo; give another --out, or delete"),
        ({"seed": 7}, "was built with seed 0"),
    ],
)
def test_other_settings_do_not_overwrite_a_finished_folder(videos, annotations, copy, change, message):
    before = contents(copy)
    with pytest.raises(ValueError, match=message):
        build_shards(annotations, videos=videos, out=copy, subset="training", config=replace(CONFIG, **change))
    assert contents(copy) == before


def test_nothing_but_blocked_videos_is_an_error(videos, annotations, tmp_path):
    config = replace(CONFIG, blocked=frozenset(GOOD) | frozenset(BAD))
    with pytest.raises(ValueError, match="every video of subset 'training' is blocked"):
        build_shards(annotations, videos=videos, out=tmp_path, subset="training", config=config)


def test_no_video_at_all_is_an_error_that_says_where_it_looked(annotations, tmp_path):
    with pytest.raises(ValueError, match=r"none of the 10 videos of subset 'training' is in .*_d\.mp4, v__d\.mp4"):
        build_shards(annotations, videos=tmp_path, out=tmp_path / "out", subset="training", config=CONFIG)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        build_shards(annotations, videos=tmp_path / "nowhere", out=tmp_path, subset="training", config=CONFIG)


def test_of_two_files_with_one_id_none_is_taken_unless_the_annotations_name_one():
    names = ["a.mp4", "v_a.MKV", "b.mp4", "c.mkv", "c.mp4", "v_d.mp4", "cafe\u0301.mp4"]
    files = NamedFiles(Path("videos", name) for name in names)
    wanted = ["a", "b", "c", "d", "v_d", "café", "gone"]
    chosen = files.choose(wanted, keys={"c": "c.mp4", "b": "b.avi"})
    assert {video_id: path.name for video_id, path in chosen.found.items()} == {
        "b": "b.mp4",
        "c": "c.mp4",
        "café": "cafe\u0301.mp4",
    }
    assert chosen.faults == {
        "a": "a.mp4 and v_a.MKV are files of one video; keep one of them",
        "d": "v_d.mp4 would be video 'd' and video 'v_d'; keep one of them",
        "v_d": "v_d.mp4 would be video 'd' and video 'v_d'; keep one of them",
    }
    assert chosen.notes == {"c": "c.mp4 is taken as 'c', not c.mkv"}
    assert chosen.only(["a", "c"]) == Chosen({"c": chosen.found["c"]}, {"a": chosen.faults["a"]}, chosen.notes)
    assert files.choose(["a"], keys={"a": "a.mkv"}).found["a"].name == "v_a.MKV"
    assert "c" in files.choose(["c"], keys={"c": "c.avi"}).faults
    faults = NamedFiles([Path("day 1", "a.mp4"), Path("day 2", "a.mp4")]).choose(["a"], keys={"a": "a.mp4"}).faults
    assert faults == {"a": "day 1/a.mp4 and day 2/a.mp4 are files of one video; keep one of them"}


def test_a_file_is_not_the_video_of_two_subsets(tmp_path):
    (tmp_path / "v_a.mp4").write_bytes(b"x")
    (tmp_path / "b.mp4").write_bytes(b"x")
    records = {"training": ("a", "b"), "validation": ("v_a", "gone"), "test": ("v_b",)}
    subsets = {
        name: tuple(VideoRecord(one, name, 2.0, (Action(0.5, 1.0, "run"),)) for one in ids)
        for name, ids in records.items()
    }
    listed = Annotations(subsets, ("run",))
    _, chosen = find_sources(listed, tmp_path, subset="training", config=replace(CONFIG, blocked=frozenset({"v_b"})))
    fault = "v_a.mp4 would be video 'a' and video 'v_a'; keep one of them"
    assert (chosen.found, chosen.faults) == ({"b": tmp_path / "b.mp4"}, {"a": fault})
    _, chosen = find_sources(listed, tmp_path, subset="validation", config=CONFIG)
    assert (chosen.found, chosen.faults) == ({}, {"v_a": fault})


def test_a_subset_of_unusable_videos_only_is_an_error_with_a_reason(videos, annotations, tmp_path):
    config = replace(CONFIG, blocked=frozenset(GOOD) | {"cut", "long"})
    with pytest.raises(ValueError, match=r"none of the 3 videos can be used; the first, \w+: [^()]* "):
        build_shards(annotations, videos=videos, out=tmp_path, subset="training", config=config)


def test_the_plan_depends_on_the_seed_and_is_bounded_by_bytes_and_by_count():
    items = [Item(VideoRecord(f"v{i}", "training", 1.0, ()), "0" * 64, num_bytes=10 + i % 3) for i in range(200)]

    def plan(number: int, seed: int = 0, max_bytes: int = 110, per_shard: int | None = None) -> list[list[str]]:
        empty = Plan(seed, "shards build", ())
        groups = extended(empty, items[:number], first=5, max_bytes=max_bytes, per_shard=per_shard).groups
        assert [group.name for group in groups] == [f"shard-{5 + i:06d}.tar" for i in range(len(groups))]
        return [[one.video_id for one in group.videos] for group in groups]

    assert plan(200) == plan(200) != plan(200, seed=1)
    assert sorted(video_id for shard in plan(200) for video_id in shard) == sorted(item.video_id for item in items)
    sizes = {item.video_id: item.num_bytes for item in items}
    totals = [sum(sizes[video_id] for video_id in shard) for shard in plan(200)]
    assert all(98 < total <= 110 for total in totals[:-1])
    assert [len(shard) for shard in plan(10, max_bytes=1000, per_shard=4)] == [4, 4, 2]
    assert [len(shard) for shard in plan(3, max_bytes=1)] == [1, 1, 1]


def test_a_disk_that_is_full_stops_the_build_and_rejects_nobody(videos, annotations, tmp_path, monkeypatch):
    def full(path, pairs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("re2tal.data.building.video_folder.write_tar", full)
    with pytest.raises(OSError, match="No space left"):
        build_shards(annotations, videos=videos, out=tmp_path, subset="training", config=replace(CONFIG, workers=2))
    assert [*contents(tmp_path)] == ["training/.reports/plan.json"]


def test_a_video_with_little_damage_is_kept_and_named_and_one_with_much_is_left_out(tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, num_packets in (("little", 1), ("much", 9), ("sound", 0)):
        path = write_video(videos / f"{name}.mp4", num_frames=120, options={"g": "1", "bf": "0"})
        with av.open(str(path)) as container:
            places = [(p.pos, p.size) for p in container.demux(video=0) if p.size][60 : 60 + num_packets]
        content = bytearray(path.read_bytes())
        for place, size in places:
            content[place : place + size] = bytes(size)
        path.write_bytes(content)
    entry = {"subset": "training", "duration": 4.0, "annotations": [{"segment": [0.5, 1.5], "label": "run"}]}
    (tmp_path / "a.json").write_text(json.dumps({"database": dict.fromkeys(("little", "much", "sound"), entry)}))
    listed = read_annotations(tmp_path / "a.json")
    built = build_shards(listed, videos=videos, out=tmp_path / "out", subset="training", config=CONFIG)
    shards = open_shards(built.folder)
    assert {name: video.damaged_share for name, video in shards.by_id.items()} == {"little": 1 / 120, "sound": 0}
    (little,) = shards.manifest.damaged
    assert little.video_id == "little"
    assert "1 of 120 frames (0.8%) are damaged: 1 " in little.damage
    (much,) = built.rejected
    assert "much.mp4 is damaged: 9 of 120 frames (7.5%)" in much.reason
    assert "--max-damaged" in much.reason
    assert list(damage(shards)) == []
    assert report_built(built, subset="training", max_rejected=0.5) == 0
    assert "rejected much: much.mp4 is damaged" in (said := capsys.readouterr().err)
    assert "damaged little: 1 of 120 frames" in said
    more = replace(CONFIG, max_damaged=0.1)
    built = build_shards(listed, videos=videos, out=tmp_path / "out", subset="training", config=more)
    assert (len(built.rejected), len(built.damaged)) == (0, 2)


def test_odd_items_in_a_folder_of_videos_do_not_end_a_build(tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4")
    (videos / "b.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (videos / "c.mp4").symlink_to(videos / "c.mp4")
    (videos / "d.mp4").mkdir()
    os.mkfifo(videos / "e.mp4")
    (videos / "f.mp4").symlink_to("x" * 300)
    for name in ("g.mp4", "g.mkv", "h.mkv"):
        shutil.copyfile(videos / "a.mp4", videos / name)
    write_video(videos / "h.mp4", num_frames=90)
    (videos / "i.mp4").write_bytes(b"no video" * 200)
    (videos / "._a.mp4").write_bytes(b"\x00\x05\x16\x07 of macOS")
    (videos / "two words ü.mp4").write_bytes(b"")
    (videos / os.fsdecode(b"not \xff utf-8.mp4")).write_bytes(b"")
    entry = {"subset": "training", "annotations": [{"segment": [0.5, 1.5], "label": "run"}]}
    database = {name: {**entry, "duration": 2.0} for name in "abcdefg"}
    database |= {"h.mp4": {**entry, "duration": 0}, "i": entry}
    other = {**entry, "subset": "validation", "duration": 2.0}
    (tmp_path / "a.json").write_text(json.dumps({"database": {**database, "z": other, "y": other}}))
    (videos / "y.mp4").write_bytes(b"no video")
    given = {"out": tmp_path / "out", "annotations": tmp_path / "a.json", "videos": videos, "fps": 15, "short_side": 48}
    with pytest.raises(ValueError, match=r"validation: none of the 2 videos can be used; the first, [yz]: "):
        build(Build(**given, workers=1))
    shards = open_shards(tmp_path / "out" / "training")
    assert {name: video.num_frames for name, video in shards.by_id.items()} == {"a": 30, "h": 45}
    reasons = {one.video_id: one.reason for one in shards.manifest.rejected}
    two = reasons.pop("g")
    assert two == "g.mkv and g.mp4 are files of one video; keep one of them"
    assert reasons.pop("i").startswith("i.mp4 cannot be read as a video")
    assert reasons == dict.fromkeys("bcdef", "there is no file of this name, or a link that leads nowhere")
    said = capsys.readouterr().err
    for line in ("h.mp4 is taken as 'h', not h.mkv", "rejected g: ", "f.mp4 is no file", "._a.mp4 is a file of macOS"):
        assert line in said


def test_an_encoder_that_dies_costs_its_video_and_not_the_build(videos, annotations, tmp_path, monkeypatch):
    calls = itertools.count()
    call = Isolated.call

    def dying(isolated, timeout_seconds, function, *args, **kwargs):
        if next(calls) == 0:
            return call(isolated, timeout_seconds, os.abort)
        return call(isolated, timeout_seconds, function, *args, **kwargs)

    monkeypatch.setattr(Isolated, "call", dying)
    config = replace(CONFIG, blocked=frozenset(BAD))
    built = build_shards(annotations, videos=videos, out=tmp_path, subset="training", config=config)
    (lost,) = built.rejected
    assert lost.reason == "its process died (exit code -6); to have it tried again, touch its file"
    assert len(open_shards(built.folder).videos) == len(GOOD) - 1


def test_names_with_spaces_dots_and_any_script_are_kept_from_the_file_to_the_shard(tmp_path):
    names = {"my video.v2": "my video.v2.mp4", "cafe\u0301.mp4": "Küche/1. Tag/café.mp4", "録画 1": "v_録画 1.mkv"}
    (tmp_path / "Küche" / "1. Tag").mkdir(parents=True)
    database = {}
    for name, file_name in names.items():
        write_video(tmp_path / file_name, num_frames=20)
        database[name] = {"subset": "training", "duration": 20 / 30, "annotations": []}
    database["my video.v2"]["annotations"] = [{"segment": [0, 0.5], "label": "run"}]
    (tmp_path / "a.json").write_text(json.dumps({"database": database}))
    config = replace(CONFIG, videos_per_shard=8)
    found = read_annotations(tmp_path / "a.json")
    result = build_shards(found, videos=tmp_path, out=tmp_path / "out", subset="training", config=config)
    assert result.rejected == ()
    shards = open_shards(result.folder)
    assert sorted(shards.by_id) == sorted(["my video.v2", "cafe\u0301", "録画 1"])
    assert not list(damage(shards))
    assert shards.by_id["my video.v2"].record.actions
    with tarfile.open(result.folder / "shard-000000.tar") as tar:
        keys = {name.split(".")[0] for name in tar.getnames()}
    assert keys == {"my%20video%2Ev2", "cafe%CC%81", "%E9%8C%B2%E7%94%BB%201"}
    assert {one["__key__"] for one in WebDataset([str(result.folder / "shard-000000.tar")], shardshuffle=False)} == keys
    for video in shards.videos:
        shown = read_numbers(decode_frames(read_content(shards, video), range(10)).numpy())
        assert list(shown) == list(range(0, 20, 2))  # stored at half the rate


def test_copies_keep_their_bytes_and_what_a_decoder_would_number_wrong_is_encoded(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    closed = {"g": "20", "x264-params": "open-gop=0"}
    write_video(videos / "sound.mp4", options=closed, sound=True)
    write_video(videos / "open.mp4", options={"g": "20", "bf": "2", "x264-params": "open-gop=1:b-pyramid=none"})
    write_video(videos / "turned.mp4", options=closed, rotation=90)
    write_video(videos / "matroska.mkv", options=closed)
    write_video(videos / "uneven.mp4", options=closed, milliseconds=[33 * n + 11 * (n % 3) for n in range(60)])
    content = bytearray(write_video(videos / "whole.mp4", options=closed).read_bytes())
    with av.open(str(videos / "whole.mp4")) as container:
        place, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][30]
    content[place : place + size] = bytes(size)
    (videos / "broken.mp4").write_bytes(content)
    ids = ("sound", "open", "turned", "matroska", "uneven", "whole", "broken")
    entry = {"subset": "training", "duration": 2.0, "annotations": [{"segment": [0.5, 1.5], "label": "run"}]}
    (tmp_path / "a.json").write_text(json.dumps({"database": dict.fromkeys(ids, entry)}))
    listed = read_annotations(tmp_path / "a.json")
    config = replace(CONFIG, copy=True, videos_per_shard=None, max_damaged=1.0, workers=2)
    built = build_shards(listed, videos=videos, out=tmp_path / "out", subset="training", config=config)
    shards = open_shards(built.folder)
    kept = {
        video_id for video_id, video in shards.by_id.items()
        if read_content(shards, video) == next(videos.glob(f"{video_id}.*")).read_bytes()
    }  # fmt: skip
    assert kept == {"sound", "whole"}
    assert (built.num_copies, len(shards.videos) + len(built.rejected)) == (3, len(ids))
    reasons = {note.split(":")[0].removeprefix("encoded "): note for note in built.notes}
    assert sorted(reasons) == ["broken", "open", "turned", "uneven"]
    assert "groups of pictures are open" in reasons["open"]
    assert "it is to be turned" in reasons["turned"]
    for video_id in (*kept, "matroska"):
        mp4 = read_video(shards, shards.by_id[video_id])
        assert read_numbers(decode_frames(*mp4.cut([59, 3, 31])).numpy()) == [59, 3, 31]
    assert list(damage(shards)) == []
    with pytest.raises(
        ValueError, match=r"was built with `re2tal shards build --copy`, now it is `re2tal shards build`"
    ):
        build_shards(listed, videos=videos, out=tmp_path / "out", subset="training", config=replace(config, copy=False))


HEVC = "log-level=none:keyint=20:open-gop={}"
FAST = {"g": "20", "deadline": "realtime", "cpu-used": "8"}
COPIES = {
    "hevc.mp4": ("libx265", {"x265-params": HEVC.format(0), "tag": "hvc1"}, ""),
    "hevc.mkv": ("libx265", {"x265-params": HEVC.format(0)}, ""),
    "vp9.mp4": ("libvpx-vp9", FAST, ""),
    "vp9.webm": ("libvpx-vp9", FAST, ""),
    "h264.mov": ("libx264", {"g": "20", "bf": "2"}, ""),
    "h264.mkv": ("libx264", {"g": "20", "bf": "2"}, ""),
    "open.mkv": ("libx265", {"x265-params": HEVC.format(1)}, "groups of pictures are open"),
    "av1.mp4": ("libsvtav1", {"g": "20", "preset": "12"}, r"its codec is 'av01' .* only H\.264, HEVC and VP9"),
    "av1.webm": ("libsvtav1", {"g": "20", "preset": "12"}, "it is libdav1d in matroska; H.264, HEVC, VP9 in mp4"),
    "vp8.webm": ("libvpx", FAST, "it is vp8 in matroska; "),
    "mpeg4.mp4": ("mpeg4", {"g": "20"}, "its codec is 'mp4v'"),
    "h264.ts": ("libx264", {"g": "20"}, "it is h264 in mpegts; H.264, HEVC, VP9 in mp4, mov, mkv or webm can be kept"),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_is_kept_is_read_frame_by_frame_as_the_source_and_the_rest_is_refused_by_name(tmp_path, name):
    codec, options, refused = COPIES[name]
    source = write_video(tmp_path / name, codec=codec, options=options)
    probe = probe_video(source)
    if refused:
        with pytest.raises(ValueError, match=refused):
            mp4_of(source, probe=probe)
        return
    mp4 = mp4_of(source, probe=probe)
    result = check_as_it_is(source, mp4, probe=probe)
    assert (result.num_frames, result.fps) == (60, 30)
    with av.open(str(source)) as container:
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert read_numbers(shown) == list(range(60))
    for wanted in (range(60), [0, 19, 20, 21, 59], [33], [59, 0, 40]):
        part, places = mp4.cut(list(wanted))
        for decoder in ("decord", "pyav"):
            frames = decode_frames(part, places, decoder=decoder).numpy()
            assert np.abs(frames.astype(int) - shown[list(wanted)]).max() <= 2, decoder


def test_a_copy_shows_the_colours_that_a_player_shows(tmp_path):
    """BT.709 and full range, of saturated colours: copied only if the decoder heeds the tags."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :32], picture[:24, 32:], picture[24:, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for name, matrix, space, colours in (
        ("hd", 1, Colorspace.ITU709, ColorRange.MPEG),
        ("full", 6, Colorspace.ITU601, ColorRange.JPEG),
    ):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"crf": "4", "x264-params": "open-gop=0"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.codec_context.colorspace, stream.codec_context.color_range = matrix, colours
            for _ in range(60):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace=space, dst_color_range=colours)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    entry = {"subset": "training", "duration": 2.0, "annotations": [{"segment": [0.5, 1.5], "label": "run"}]}
    (tmp_path / "a.json").write_text(json.dumps({"database": dict.fromkeys(("hd", "full"), entry)}))
    config = replace(CONFIG, copy=True, videos_per_shard=None)
    listed = read_annotations(tmp_path / "a.json")
    built = build_shards(listed, videos=tmp_path, out=tmp_path / "out", subset="training", config=config)
    shards = open_shards(built.folder)
    for video in shards.videos:
        shown = decode_frames(read_content(shards, video), [30]).numpy()[0].astype(int)
        for place, colour in (((24, 16), (255, 0, 0)), ((12, 48), (0, 255, 0)), ((36, 48), (0, 0, 255))):
            assert np.abs(shown[place] - colour).max() <= 4, (video.record.video_id, built.num_copies)


def test_a_file_that_was_written_again_is_tried_again_if_it_was_refused_or_damaged(tmp_path):
    """A download that was completed in place has the same length, and may have the same blocks."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"whatever it holds")
    record = VideoRecord("a", "training", 2.0, ())
    (before,) = list_items([record], Chosen({"a": path}), config=CONFIG)
    os.utime(path, ns=(1, 1))
    (after,) = list_items([record], Chosen({"a": path}), config=CONFIG)
    assert before.fingerprint == after.fingerprint != ""
    assert (before.terms != after.terms, after.modified_ns) == (True, 1)
