"""Tars of other programs become shards, and what cannot be read by frame number is left out and named."""

from __future__ import annotations

import json
import os
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from data.files import write_video
from data.numbered import encode, encode_numbered, numbered_frame, read_numbers
from webdataset.writer import TarWriter

from re2tal.cli import main
from re2tal.data.building import index_tars
from re2tal.data.building.annotations import read_annotations
from re2tal.data.building.match_samples import match_samples
from re2tal.data.building.shard_plan import Item
from re2tal.data.building.tar_samples import Sample, list_clips, read_samples
from re2tal.data.contract.manifest import Encoding, from_json, to_json
from re2tal.data.contract.members import read_content, read_video
from re2tal.data.contract.shards import open_shards
from re2tal.data.contract.verify import damage
from re2tal.data.streaming.decode import decode_frames


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["shards", "index", *map(str, arguments)])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def annotate(path: Path, *video_ids: str, seconds: float = 2.0) -> Path:
    one = {"subset": "training", "duration": seconds, "annotations": [{"segment": [0.5, 1.5], "label": "run"}]}
    path.write_text(json.dumps({"database": dict.fromkeys(video_ids, one)}))
    return path


def foreign(path: Path, **options) -> bytes:
    return write_video(path, **options).read_bytes()


def test_videos_of_shardwriter_and_video2dataset_are_taken_and_others_named(tmp_path, capsys):
    good, tars = encode_numbered(60), tmp_path / "tars"
    tars.mkdir()
    wrong = foreign(tmp_path / "a.mp4", codec="mpeg4", options={"bf": "2", "g": "12"})
    uneven = foreign(tmp_path / "b.mp4", milliseconds=[40 * n + 9 * (n % 3) for n in range(60)])
    with (tars / "plain-00.tar").open("wb") as file, TarWriter(file) as writer:
        for key, mp4 in (("one", good), ("v_two", good), ("wrong", wrong), ("uneven", uneven)):
            writer.write({"__key__": key, "mp4": mp4, "json": {"caption": "x"}, "thumbnail.bin": b"no picture"})
    with (tars / "plain-01.tar").open("wb") as file, TarWriter(file) as writer:
        writer.write({"__key__": "other", "mp4": good})
        writer.write(
            {"__key__": "00000001", "mp4": good, "json": {"url": "https://youtu.be/watch?v=three", "key": "1"}}
        )
        writer.write({"__key__": "cut", "mp4": good[:3000], "txt": "a caption"})
    with tarfile.open(tars / "plain-90.tar", "w") as tar:
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        sparse = tarfile.TarInfo("sparse.mp4")
        sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
        tar.addfile(sparse, BytesIO(bytes(512)))
    ids = ("one", "two", "three", "wrong", "uneven", "cut", "link", "sparse", "gone")
    status, out, err = run(
        capsys, tars, "--annotations", annotate(tmp_path / "a.json", *ids), "--out", tmp_path / "out"
    )
    assert status == 3
    assert "a.json: plain-01.tar other" in err
    shards = open_shards(tmp_path / "out" / "training")
    assert sorted(shards.by_id) == ["one", "three", "two"]
    assert list(damage(shards)) == []
    for video in shards.videos:
        assert read_numbers(decode_frames(*read_video(shards, video).cut([59, 3])).numpy()) == [59, 3]
    reasons = {one.video_id: one.reason for one in shards.manifest.rejected}
    assert sorted(reasons) == ["cut", "gone", "link", "sparse", "uneven", "wrong"]
    for video_id, words in {
        "wrong": "codec is 'mp4v'",
        "uneven": "rate is not constant",
        "cut": "mp4",
        "link": "no plain file",
        "sparse": "no plain file (type b'S')",
        "gone": "no sample of the tars",
    }.items():
        assert words in reasons[video_id]
    assert "3 videos, 0.00 h, 30 frames per second" in out


def test_labels_beside_trimmed_clips_are_their_classes(tmp_path, capsys):
    with (tmp_path / "00.tar").open("wb") as file, TarWriter(file) as writer:
        writer.write({"__key__": "a", "mp4": encode_numbered(30), "cls": 1})
        writer.write({"__key__": "b", "mp4": encode_numbered(45), "txt": "jump"})
        writer.write({"__key__": "c", "mp4": encode_numbered(45), "bin": b"no label"})
    (tmp_path / "classes.txt").write_text("jump\nrun\n")
    status, _, err = run(capsys, tmp_path, "--classes", tmp_path / "classes.txt", "--out", tmp_path / "out")
    assert (status, "left out 00.tar c: its label is ''" in err) == (0, True)
    shards = open_shards(tmp_path / "out" / "training")
    assert {k: (v.record.actions[0].label, v.record.duration_seconds) for k, v in shards.by_id.items()} == {
        "a": ("run", 1.0),
        "b": ("jump", 1.5),
    }


def test_pictures_that_do_not_decode_are_found(tmp_path, capsys):
    good = encode_numbered(200)
    middle = good.index(b"moov") // 2
    bad = good[:middle] + bytes(400) + good[middle + 400 :]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, mp4 in (("good.mp4", good), ("bad.mp4", bad)):
            member = tarfile.TarInfo(name)
            member.size = len(mp4)
            tar.addfile(member, BytesIO(mp4))
    annotations = annotate(tmp_path / "a.json", "good", "bad", seconds=200 / 30)
    run(capsys, tmp_path, "--annotations", annotations, "--out", tmp_path / "out")
    shards = open_shards(tmp_path / "out" / "training")
    assert ([*shards.by_id], [one.video_id for one in shards.manifest.rejected]) == (["good"], ["bad"])


def write_tars(folder: Path, **tars: list[tuple[str, bytes]]) -> Path:
    """Tars of plain files, name -> (member, content)."""
    folder.mkdir(exist_ok=True)
    for tar_name, members in tars.items():
        with tarfile.open(folder / f"{tar_name}.tar", "w") as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    return folder


def test_a_key_wins_over_what_a_json_says_and_no_sample_becomes_two_videos(tmp_path, capsys):
    tars = write_tars(
        tmp_path / "tars",
        a=[
            ("000001.mp4", encode_numbered(60)),
            ("000001.json", b'{"id": "000002"}'),
            ("000002.mp4", encode_numbered(61)),
            ("v_x.mp4", encode_numbered(62)),
            ("7.mp4", encode_numbered(60)),
            ("7.json", b'{"id": "x", "key": "8"}'),
            ("9.mp4", encode_numbered(60)),
            ("9.json", b'{"id": "y", "key": "z"}'),
            ("10.mp4", encode_numbered(60)),
            ("10.json", b'{"id": "000001", "key": "10b"}'),
        ],
    )
    annotations = annotate(tmp_path / "a.json", "000001", "000002", "x", "8", "y", "z", "10", "10b")
    status, _, err = run(capsys, tars, "--annotations", annotations, "--out", tmp_path / "out")
    shards = open_shards(tmp_path / "out" / "training")
    assert status == 3
    frames = {"000001": 60, "000002": 61, "x": 62, "8": 60, "10": 60}
    assert {k: v.num_frames for k, v in shards.by_id.items()} == frames
    assert {one.video_id: one.reason for one in shards.manifest.rejected} == {
        "y": "its sample, a.tar 9, is also called z",
        "z": "its sample, a.tar 9, is also called y",
        "10b": "its sample, a.tar 10, is video '10' already",
    }
    assert "a.json: a.tar 9" in err


def test_a_video_is_not_shared_by_two_subsets(tmp_path, capsys):
    tars = write_tars(tmp_path / "tars", a=[("1.mp4", encode_numbered(60)), ("1.json", b'{"id": "2"}')])
    annotations = annotate(tmp_path / "a.json", "1", "2")
    said = json.loads(annotations.read_text())
    said["database"]["2"]["subset"] = "validation"
    annotations.write_text(json.dumps(said))
    status, _, err = run(capsys, tars, "--annotations", annotations, "--out", tmp_path / "out")
    assert status == 2
    assert "2: its sample, a.tar 1, is video '1' already" in err


def test_samples_of_one_name_are_left_out_and_named(tmp_path, capsys):
    good = encode_numbered(60)
    tars = write_tars(
        tmp_path / "tars",
        a=[("x/p.mp4", good), ("x/p.cls", b"run"), ("q.mp4", good), ("q.cls", b"run")],
        b=[("y/p.mp4", good), ("y/p.cls", b"jump"), ("r.mp4", good), ("r.cls", b"jump"), ("r.mp4", good)],
    )
    wanted = {
        "p": "2 samples are called so: a.tar x/p, b.tar y/p; keep one",
        "r": "b.tar r: its tar holds mp4 of this key twice",
    }
    annotations = annotate(tmp_path / "a.json", "p", "q", "r")
    for out, options in (("clips", ()), ("annotated", ("--annotations", annotations))):
        status, *_ = run(capsys, tars, *options, "--out", tmp_path / out)
        shards = open_shards(tmp_path / out / "training")
        assert (status, [*shards.by_id]) == (3, ["q"])
        assert {one.video_id: one.reason for one in shards.manifest.rejected} == wanted


def labelled(**labels: dict[str, bytes]) -> list[Sample]:
    return [Sample(Path("a.tar"), key, videos={"mp4": (0, 1)}, labels=one) for key, one in labels.items()]


def test_a_label_is_a_name_or_the_sample_is_left_out():
    samples = labelled(
        nothing={"json": b'{"label": null}', "cls": b"run"},
        two={"json": b'{"label": ["run", "x"]}', "cls": b"run"},
        truth={"json": b'{"label": true}'},
        spaces={"json": b'{"label": " jump "}'},
        blank={"txt": b"  "},
    )
    listed, left_out = list_clips(samples, subset="training", classes=None)
    assert {clip.video_id: clip.label for clip in listed.subset("training")} == {"nothing": "run", "spaces": "jump"}
    assert listed.classes == ("jump", "run")
    assert [line.split(";")[0] for line in left_out] == [
        "a.tar two: its label is ['run', 'x']",
        "a.tar truth: its label is True",
        "a.tar blank: its label is '  '",
    ]


def test_labels_that_are_numbers_need_a_class_list():
    samples = labelled(a={"cls": b"0"}, b={"json": b'{"label": 1}'}, c={"cls": b"2"})
    with pytest.raises(ValueError, match=r"the labels are numbers \(0, 1, 2, \.\.\.\).* give --classes FILE"):
        list_clips(samples, subset="training", classes=None)
    listed, left_out = list_clips(samples, subset="training", classes=["jump", "run"])
    assert [clip.label for clip in listed.subset("training")] == ["jump", "run"]
    assert left_out == ["a.tar c: the class is number 2, and 2 were given, counted from 0"]


def test_labels_that_differ_by_case_are_refused():
    samples = labelled(a={"cls": b"Run"}, b={"cls": b"run"}, c={"cls": b"jump"})
    with pytest.raises(ValueError, match=r"labels 'Run' \(1 times\) and 'run' .* differ only by case.* --classes FILE"):
        list_clips(samples, subset="training", classes=None)
    listed, left_out = list_clips(samples, subset="training", classes=["run", "jump"])
    assert [clip.video_id for clip in listed.subset("training")] == ["b", "c"]
    assert left_out == ["a.tar a: class 'Run' is spelled 'run' in the list; correct it, or use --fix-labels"]
    listed, left_out = list_clips(samples, subset="training", classes=None, fix_labels=True)
    assert {clip.label for clip in listed.subset("training")} == {"run", "jump"} or listed.classes == ("Run", "jump")
    assert (len(listed.subset("training")), left_out, len(listed.notes)) == (3, [], 1)


def test_tars_of_equal_names_and_sizes_are_told_apart_by_their_content(tmp_path, capsys):
    numbers = encode_numbered(60), encode(255 - np.stack([numbered_frame(number) for number in range(60)]))
    size = max(map(len, numbers)) + 8
    padded = [mp4 + (size - len(mp4)).to_bytes(4, "big") + b"free" + bytes(size - len(mp4) - 8) for mp4 in numbers]
    annotations = annotate(tmp_path / "a.json", "one")
    seen = []
    for folder, mp4 in zip(("first", "second"), padded, strict=True):
        tars = write_tars(tmp_path / folder, a=[("one.mp4", mp4)])
        assert run(capsys, tars, "--annotations", annotations, "--out", tmp_path / "out")[0] == 0
        shards = open_shards(tmp_path / "out" / "training")
        seen.append(read_content(shards, shards.videos[0]))
    assert (tmp_path / "first" / "a.tar").stat().st_size == (tmp_path / "second" / "a.tar").stat().st_size
    assert seen == padded


def test_a_key_that_stands_for_a_name_is_found_by_the_name():
    assert "my video.v2" in Sample(Path("a.tar"), "my%20video%2Ev2").names


def test_tars_in_linked_folders_and_with_suffixes_in_capitals_are_read(tmp_path):
    write_tars(tmp_path / "elsewhere", a=[("one.mp4", b"x")])
    write_tars(tmp_path / "tars", b=[("two.mp4", b"x")])
    (tmp_path / "tars" / "b.tar").rename(tmp_path / "tars" / "B.TAR")
    (tmp_path / "tars" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tars" / "round").symlink_to(tmp_path / "tars")
    samples, unread = read_samples(tmp_path / "tars")
    assert [sample.key for sample in samples] == ["two", "one"]
    assert len(unread) == 1
    assert "round is not looked at: by a link it is the folder" in unread[0]


def test_a_tar_that_was_written_again_has_its_refused_videos_tried_again(tmp_path):
    write_tars(tmp_path / "tars", a=[("one.mp4", b"whatever it holds")])
    annotations = read_annotations(annotate(tmp_path / "a.json", "one"))

    def item() -> Item:
        return index_tars._item(annotations.subset("training")[0], match_samples(annotations, samples))

    samples, _ = read_samples(tmp_path / "tars")
    before = item()
    os.utime(samples[0].tar, ns=(1, 1))
    after = item()
    assert before.fingerprint == after.fingerprint != ""
    assert before.terms != after.terms


def test_a_manifest_of_slow_motion_can_be_read(tmp_path):
    with (tmp_path / "00.tar").open("wb") as file, TarWriter(file) as writer:
        writer.write({"__key__": "a", "mp4": encode_numbered(8, fps=300)})
    annotations, (samples, _) = read_annotations(annotate(tmp_path / "a.json", "a")), read_samples(tmp_path / "00.tar")
    matches = match_samples(annotations, samples)
    encoding = index_tars._encoding(tmp_path / "out", annotations.subset("training"), matches)
    assert from_json(Encoding, to_json(encoding).encode(), source="manifest") == encoding
