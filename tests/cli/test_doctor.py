"""`re2tal doctor` on a folder with one fault of each kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data.files import cut_short, write_sound, write_video

from re2tal.cli import main
from re2tal.data.building.isolated import IsolatedPool


def run(capsys, *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *map(str, arguments)])
    return end.value.code, capsys.readouterr().out


def entry(*segments: tuple[float, float], duration: float = 2.0, label: str = "run") -> dict:
    annotations = [{"segment": list(segment), "label": label} for segment in segments]
    return {"subset": "training", "duration": duration, "annotations": annotations}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "good.mp4")
    write_video(folder / "long.mp4")
    write_video(folder / "varies.mp4", milliseconds=[33 * k + 100 * (k // 7) for k in range(60)])
    cut_short(write_video(folder / "whole.mkv"), folder / "cut.mkv", share=0.5)
    (folder / "whole.mkv").unlink()
    write_sound(folder / "sound.mp4")
    (folder / "text.mp4").write_text("no video")
    (folder / "._good.mp4").write_text("")
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    return folder


def test_videos_by_themselves(capsys, folder, tmp_path):
    status, out = run(capsys, folder, "--json", tmp_path / "out.json", "--workers", "1")
    assert status == 1
    found = {row["video_id"]: row for row in json.loads((tmp_path / "out.json").read_text())["videos"]}
    states = {name: row["state"] for name, row in found.items()}
    assert states.pop("cut") in ("damaged", "unusable")
    assert states == {"good": "ok", "long": "ok", "varies": "ok", "sound": "unusable", "text": "unusable"}
    assert found["varies"]["remarks"] == ["its frame rate varies"]
    assert "has no video stream, only audio" in found["sound"]["remarks"][0]
    assert found["good"]["examined"]["num_frames"] == 60
    assert found["good"]["examined"]["codec"] == "h264"
    assert "note: gone.mp4 is no file, or a link that leads nowhere" in out
    assert "note: ._good.mp4 is a file of macOS" in out
    assert "6 videos: 3 ok, " in out


def test_videos_against_annotations(capsys, folder, tmp_path):
    database = {
        "good": entry((0, 1), (1, 2.5)),
        "long": entry((0, 1), (6, 9), duration=10.0),
        "absent": entry((0, 1), label="Run "),
        "varies": {"subset": "training", "annotations": []},
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"database": database}))
    status, out = run(capsys, folder, path, "--quick", "--workers", "1")
    assert status == 1
    assert "labels 'run' (4 times) and 'Run ' (1 times) differ only by case" in out
    assert "there is no file of this name" in out
    assert "it lasts 2.00 s, the annotation file says 10.00 s; 1 actions end after the video, the last at 9.00 s" in out
    assert "4 videos: 2 ok, " in out
    assert "1 faults of the annotations" in out
    assert "3 files belong to no entry, such as cut.mkv" in out


def test_nothing_is_wrong(capsys, folder, tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"database": {"good": entry((0, 1))}}))
    status, out = run(capsys, folder, path, "--quick", "--workers", "1")
    assert status == 0
    assert out.endswith("1 videos: 1 ok; 0 faults of the annotations\n")


def test_a_folder_without_videos_is_not_sound(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["doctor", str(tmp_path)])
    assert end.value.code == 2
    assert f"{tmp_path} holds no video file" in capsys.readouterr().err


def test_only_what_the_annotations_name_is_read(capsys, folder, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(IsolatedPool, "call", lambda self, seconds, function, path, **given: read.append(path.name))
    (tmp_path / "a.json").write_text(json.dumps({"database": {"good": {"subset": 7}, "v_long.mp4": {}}}))
    status, out = run(capsys, folder, tmp_path / "gone.json")
    assert (status, read) == (2, [])
    monkeypatch.undo()
    status, out = run(capsys, folder, tmp_path / "a.json", "--quick", "--workers", "1")
    assert status == 1
    assert "database.good: subset is 7" in out
    assert out.endswith("1 videos: 1 ok; 1 faults of the annotations\n")


@pytest.mark.parametrize("workers", [0, -3])
def test_fewer_workers_than_one_are_refused(capsys, folder, tmp_path, workers):
    assert run(capsys, folder, "--workers", workers)[0] == 2
    with pytest.raises(SystemExit) as end:
        main(["demo", "--out", str(tmp_path), "--workers", str(workers)])
    assert (end.value.code, capsys.readouterr().err) == (2, f"re2tal: --workers is {workers}; give 1 or more\n")


def test_the_machine(capsys, tmp_path):
    status, out = run(capsys, "--json", tmp_path / "machine.json")
    assert status == 0
    facts = json.loads((tmp_path / "machine.json").read_text())
    assert facts.keys() >= {"torch", "deepspeed", "devices", "DeepSpeed operations", "/dev/shm", "open files"}
    assert "cpu_adam" in facts["DeepSpeed operations"]
    assert facts["torch"] in out
