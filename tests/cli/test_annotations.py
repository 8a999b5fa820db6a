"""`re2tal annotations` from file to file, and what `re2tal shards build` then says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from data.files import write_video

from re2tal.cli import main
from re2tal.data.building.annotation_formats.formats import FORMATS
from re2tal.data.building.annotations import read_annotations
from re2tal.structures import Action, VideoRecord


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_a_table_and_its_videos_become_what_a_build_reads(capsys, tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4")
    table = tmp_path / "list.csv"
    table.write_text("video,start,end,label\na.mp4,00:00.5,00:01.5,arm wrestling\na.mp4,1.5,1.5,run\n")
    out = tmp_path / "out.json"
    status, said, err = run(capsys, "annotations", "convert", table, "--out", out, "--videos", tmp_path / "videos")
    assert status == 0
    assert "1 file read as csv" in said
    assert f"{out}: 1 videos (1 training), 1 actions, 1 classes, 1 left out" in said
    assert "left out list.csv row 3: its segment 1.5 to 1.5 s lasts no time" in err
    (record,) = read_annotations(out).subset("training")
    assert record == VideoRecord("a", "training", record.duration_seconds, (Action(0.5, 1.5, "arm wrestling"),))
    assert record.duration_seconds == pytest.approx(2.0, abs=0.1)


def test_frames_take_their_rate_from_the_videos(capsys, tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4")
    table = tmp_path / "list.csv"
    table.write_text("video,start_frame,end_frame,label\na,10,20,run\nb,10,20,run\n")
    command = ["annotations", "convert", table, "--out", tmp_path / "out.json"]
    status, _, err = run(capsys, *command, "--videos", tmp_path / "videos")
    assert status == 0
    assert "list.csv row 3: its times are frames, and no file in --videos tells how many make a second" in err
    (record,) = read_annotations(tmp_path / "out.json").subset("training")
    from_file = json.loads((tmp_path / "out.json").read_text())["database"]["a"]
    assert record.actions == (Action(0.333333, 0.666667, "run"),)  # 30 frames per second
    assert from_file["duration"] == record.duration_seconds


def test_numbers_of_classes_take_the_names_of_the_data_sets_own_list(capsys, tmp_path):
    (tmp_path / "m.json").write_text('{"v": {"subset": "training", "duration": 9, "actions": [[2, 0.5, 1]]}}')
    (tmp_path / "classes.txt").write_text("1 BaseballPitch\n2 BasketballBlock\n")
    command = ["annotations", "convert", tmp_path / "m.json", "--out", tmp_path / "o.json"]
    status, _, _ = run(capsys, *command, "--classes", tmp_path / "classes.txt")
    assert status == 0
    assert read_annotations(tmp_path / "o.json").classes == ("BasketballBlock",)


def test_times_that_are_frames_are_suspected(capsys, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("video,start,end,label,video_duration\na,30,60,run,2\na,0,1,run,2\n")
    _, _, err = run(capsys, "annotations", "convert", table, "--out", tmp_path / "out.json")
    assert "note: 1 actions end after their video, such as 60 s in a, which lasts 2 s; if times are frames" in err


def test_several_files_of_several_kinds_and_one_that_nobody_knows(capsys, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_text("a,1,2,Run\nb,1,2,run \n")
    (folder / "Dive_test.txt").write_text("video_test_0000004 0.2 1.1\n")
    (folder / "notes.md").write_text("# notes\n")
    status, out, err = run(capsys, "annotations", "convert", folder, "--out", tmp_path / "out.json")
    assert status == 0
    assert "3 videos (2 training, 1 validation), 3 actions, 3 classes, 1 left out" in out
    assert f"left out {folder / 'notes.md'}: its format is not known" in err
    assert "labels 'Run' (1 times) and 'run' (1 times) differ only by case" in err
    assert "3 videos have no duration, such as 'video_test_0000004'" in err
    options = ["--fix-labels", "--validation", "0.5", "--subset", "mine"]
    status, out, err = run(capsys, "annotations", "convert", folder, "--out", tmp_path / "out.json", *options)
    assert "3 videos (1 mine, 2 validation), 3 actions, 2 classes" in out
    assert "label 'run' read as 'Run'" in err


def test_back_to_a_table(capsys, tmp_path):
    rows = "video,start,end,label,subset\na,1.0,2.5,run,training\n"
    (tmp_path / "a.csv").write_text(rows)
    run(capsys, "annotations", "convert", tmp_path / "a.csv", "--out", tmp_path / "b.json")
    run(capsys, "annotations", "convert", tmp_path / "b.json", "--out", tmp_path / "c.csv")
    assert (tmp_path / "c.csv").read_text() == rows


def test_a_folder_that_says_all_twice_is_named_and_its_videos_are_no_annotations(capsys, tmp_path):
    (tmp_path / "a.csv").write_text("video,start,end,label,subset\na,1,2.5,run, Training\nb,1,2.5,run,my set\n")
    (tmp_path / "a.mp4").write_bytes(b"\xff\xfe no text")
    entry = {"subset": " Training ", "annotations": [{"segment": [1, 2.5], "label": "run"}]}
    (tmp_path / "a.json").write_text(json.dumps({"database": {"a": entry}}))
    _, out, err = run(capsys, "annotations", "convert", tmp_path, "--out", tmp_path / "out.json")
    assert "2 videos (1 my set, 1 training), 3 actions, 1 classes, 0 left out" in out
    assert "note: 1 segments are there twice, and are kept: a 1 to 2.5 s 'run'" in err
    assert "note: subset 'my set' cannot be read by the next command: rename it" in err


def test_what_a_table_cannot_say_is_named(capsys, tmp_path):
    action = {"segment": [1, 2.5], "label": "run"}
    database = {name: {"subset": "training", "annotations": []} for name in ("b", "c")}
    database["a"] = {"subset": "training", "duration": 9, "annotations": [action]}
    (tmp_path / "a.json").write_text(json.dumps({"database": database}))
    _, _, err = run(capsys, "annotations", "convert", tmp_path / "a.json", "--out", tmp_path / "a.csv")
    assert "note: 2 videos without an action are not in a table, such as 'b'" in err
    assert "note: a table says no durations" in err


def test_nothing_is_written_where_no_action_is_found(capsys, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("nothing of use\n")
    status, _, err = run(capsys, "annotations", "convert", path, "--out", tmp_path / "out.json")
    assert status == 2
    assert "1 left out and no action found (no known format)" in err
    assert not (tmp_path / "out.json").exists()
    for options, message in (
        (["--out", tmp_path / "o.xml"], "ends in neither .json nor .csv"),
        (["--out", tmp_path / "o.json", "--validation", "1"], "give a share"),
        (["--out", tmp_path / "o.json", "--format", "x"], "unknown format 'x'; known: activitynet"),
    ):
        status, _, err = run(capsys, "annotations", "convert", path, *options)
        assert status == 2
        assert message in err


def test_videos_that_are_not_told_apart_are_left_out_and_the_others_written(capsys, tmp_path):
    rows = ["train/0001.mp4,1,2,run", "test/0001.mp4,1,2,run", "b,1,2,run", "c,1,2,run,train", "c,3,4,run,test"]
    (tmp_path / "a.csv").write_text("video,start,end,label,subset\n" + "\n".join(rows))
    status, out, err = run(capsys, "annotations", "convert", tmp_path / "a.csv", "--out", tmp_path / "o.json")
    assert status == 0
    assert "left out video '0001': 'train/0001.mp4' and 'test/0001.mp4' both give this id: rename one" in err
    assert "left out video 'c': it is in 'train' and in 'test': keep one" in err
    assert "1 videos (1 training), 1 actions, 1 classes, 2 left out" in out
    assert list(json.loads((tmp_path / "o.json").read_text())["database"]) == ["b"]


def test_a_file_that_its_reader_cannot_take_is_left_out(capsys, tmp_path, monkeypatch):
    row = FORMATS["csv"]

    def read(source, found):
        if source.path.name == "bad.csv":
            raise RecursionError("too deep")
        row.read(source, found)

    monkeypatch.setitem(FORMATS, "csv", replace(row, read=read))
    for name in ("bad.csv", "good.csv"):
        (tmp_path / name).write_text("a,1,2,run\n")
    status, out, err = run(capsys, "annotations", "convert", tmp_path, "--out", tmp_path / "out" / "o.json")
    assert status == 0
    assert "bad.csv: it is not read past what its reader cannot take (RecursionError: too deep)" in err
    assert "1 actions" in out


def test_two_files_of_one_video_give_no_frame_rate(capsys, tmp_path):
    for name in ("a.mp4", "a.mkv"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.csv").write_text("a,1,2,run\n")
    command = ["annotations", "convert", tmp_path / "a.csv", "--out", tmp_path / "o.json"]
    _, _, err = run(capsys, *command, "--videos", tmp_path)
    assert "has 2 files (a.mkv, a.mp4) of video 'a'" in err


def test_a_build_names_the_command_that_converts(capsys, tmp_path):
    for name, text, looks in (
        ("a.csv", "video,start,end,label\na,1,2,run\n", "it looks like a table video, start, end, label"),
        ("a.eaf", "<ANNOTATION_DOCUMENT/>", "it looks like ELAN's .eaf"),
        ("a.json", '{"a": {"duration_second": 1, "annotations": []}}', "it looks like mmaction2's JSON"),
        ("b.json", '[{"video": "a.mp4", "x": []}]', "it looks like Label Studio's JSON"),
        ("c.json", "[1]", "if another tool wrote it"),
    ):
        path: Path = tmp_path / name
        path.write_text(text)
        command = ["shards", "build", "--annotations", path, "--videos", tmp_path, "--out", tmp_path / "out"]
        status, _, err = run(capsys, *command)
        assert status == 2
        assert f"{looks}, convert it with `re2tal annotations convert {path} --out annotations.json`" in err


def test_the_formats_are_listed(capsys):
    status, out, _ = run(capsys, "annotations", "formats")
    assert status == 0
    assert "\nelan           ELAN's .eaf\n" in out


def test_a_conversion_never_reads_what_it_writes(tmp_path: Path, capsys) -> None:
    entry = {"subset": "training", "duration": 9.0, "annotations": [{"segment": [1, 2], "label": "x"}]}
    given = tmp_path / "a.json"
    given.write_text(json.dumps({"database": {"a": entry}}))
    before = given.read_bytes()
    for inputs, out in (("a.json", "a.json"), ("", "a.json"), ("a.json", "../" + tmp_path.name + "/a.json")):
        with pytest.raises(SystemExit, match="2"):
            main(["annotations", "convert", str(tmp_path / inputs), "--out", str(tmp_path / out)])
        assert "a.json is among the files to convert; give another place, or remove it" in capsys.readouterr().err
    assert given.read_bytes() == before
