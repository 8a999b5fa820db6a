"""Build real shard folders from real files; the processes that encode are started, so there are few builds."""

import itertools
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import av
import pytest
from data.files import cut_short, encoding, write_sound, write_video
from data.numbered import read_numbers
from webdataset import WebDataset

from re2tal.data.building.annotations import Annotations, read_annotations
from re2tal.data.building.build import BuildConfig, build_shards, find_videos, plan_shards
from re2tal.data.building.isolated import Isolated
from re2tal.data.contract.manifest import INDEX_NAME, MANIFEST_NAME
from re2tal.data.contract.members import read_content
from re2tal.data.contract.shards import open_shards
from re2tal.data.contract.verify import damage
from re2tal.data.streaming.decode import decode_frames
from re2tal.runs.shard_building import report_built
from re2tal.structures import Action, VideoRecord

CONFIG = BuildConfig(dataset="own", encoding=encoding(fps=15), videos_per_shard=3)
GOOD = {"a": 30, "b": 24, "c-1": 30, "_d": 25, "e": 30}
BAD = {
    "cut": "is cut short: its header promises 300 frames",
    "gone": "there is no file of this name",
    "long": "long.mp4 lasts 2.00 s, the annotation file says 9.00 s",
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
    assert seen == sorted([(video_id, True) for video_id in GOOD] + [(video_id, False) for video_id in BAD])


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
    assert (first.is_complete, first.num_shards, first.num_missing_shards) == (False, 4, 2)
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        open_shards(first.folder)
    assert build(0).is_complete
    assert contents(tmp_path / "training") == contents(built[0].folder)


def test_a_video_that_turns_up_later_changes_its_shard_only(videos, annotations, built, copy, tmp_path):
    before = contents(copy / "training")
    more = Path(shutil.copytree(videos, tmp_path / "more"))
    write_video(more / "gone.mp4")
    build_shards(annotations, videos=more, out=copy, subset="training", config=CONFIG)
    after = contents(copy / "training")
    changed = {name for name in after if after[name] != before.get(name) and name.endswith(".tar")}
    assert sorted(open_shards(copy / "training").by_id) == sorted([*GOOD, "gone"])
    assert len(changed) == 1


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
        find_videos(tmp_path / "nowhere", ["a"], file_names=("{id}",))


def test_a_video_with_two_files_is_an_error_that_names_both(tmp_path):
    for name in ("a.mp4", "v_a.MKV", "b.mp4", "b.txt", "b.json"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"video 'a' is there as \['a.mp4', 'v_a.MKV'\]; keep one"):
        find_videos(tmp_path, ["b", "a"], file_names=("{id}", "v_{id}"))
    assert find_videos(tmp_path, ["b", "c"], file_names=("{id}", "v_{id}")) == {"b": tmp_path / "b.mp4"}


def test_a_subset_of_unusable_videos_only_is_an_error_with_a_reason(videos, annotations, tmp_path):
    config = replace(CONFIG, blocked=frozenset(GOOD) | {"cut", "long"})
    with pytest.raises(ValueError, match=r"none of the 3 videos can be used; the first, \w+: [^()]* "):
        build_shards(annotations, videos=videos, out=tmp_path, subset="training", config=config)


def test_the_plan_depends_on_the_seed_and_has_enough_shards():
    records = [VideoRecord(f"v{i}", "training", 1.0, ()) for i in range(200)]
    config = replace(CONFIG, videos_per_shard=None)

    def plan(number: int, seed: int = 0) -> list[list[str]]:
        plans = plan_shards(records[:number], {}, config=replace(config, seed=seed))
        assert [p.name for p in plans] == [f"shard-{i:06d}.tar" for i in range(len(plans))]
        return [[record.video_id for record in p.records] for p in plans]

    assert plan(200) == plan(200) != plan(200, seed=1)
    assert sorted(video_id for shard in plan(200) for video_id in shard) == sorted(
        record.video_id for record in records
    )
    assert [len(shard) for shard in plan(200)] == [7] * 28 + [4]
    assert [len(shard) for shard in plan(10)] == [4, 4, 2]


def test_a_disk_that_is_full_stops_the_build_and_rejects_nobody(videos, annotations, tmp_path, monkeypatch):
    def full(path, pairs, *, suffix):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("re2tal.data.building.shard_folder.write_tar", full)
    with pytest.raises(OSError, match="No space left"):
        build_shards(annotations, videos=videos, out=tmp_path, subset="training", config=replace(CONFIG, workers=2))
    assert contents(tmp_path) == {}


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


def test_odd_items_in_a_folder_of_videos_do_not_end_a_build(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4")
    (videos / "b.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (videos / "c.mp4").symlink_to(videos / "c.mp4")
    (videos / "d.mp4").mkdir()
    (videos / "._a.mp4").write_bytes(b"\x00\x05\x16\x07 of macOS")
    (videos / "two words ü.mp4").write_bytes(b"")
    entry = {"subset": "training", "duration": 2.0, "annotations": [{"segment": [0.5, 1.5], "label": "run"}]}
    (tmp_path / "a.json").write_text(json.dumps({"database": dict.fromkeys("abcd", entry)}))
    listed = read_annotations(tmp_path / "a.json")
    built = build_shards(listed, videos=videos, out=tmp_path / "out", subset="training", config=CONFIG)
    assert sorted(open_shards(built.folder).by_id) == ["a"]
    reasons = {one.video_id: one.reason for one in built.rejected}
    assert reasons == dict.fromkeys("bcd", "there is no file of this name, or a link that leads nowhere")


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
    assert lost.reason == "its process died (exit code -6)"
    assert len(open_shards(built.folder).videos) == len(GOOD) - 1


def test_names_with_spaces_dots_and_any_script_are_kept_from_the_file_to_the_shard(tmp_path):
    names = {"my video.v2": "my video.v2.mp4", "cafe\u0301.mp4": "café.mp4", "録画 1": "v_録画 1.mkv"}
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
