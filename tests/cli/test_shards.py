import json
import os
import subprocess
from pathlib import Path

import pytest
from data.files import write_video

from re2tal.cli import main
from re2tal.data.contract.manifest import FramesPerSecond, FramesPerVideo, to_json
from re2tal.data.contract.shards import open_shards, subset_folder
from re2tal.runs.lock import locked
from re2tal.runs.shard_building import parse_size

SCRIPT = Path(__file__).parents[2] / "launch" / "shards.slurm"


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """Options for three sound videos and a missing one, in two subsets."""
    folder = tmp_path_factory.mktemp("given")
    database = {}
    for video_id, subset in (("a", "training"), ("b", "training"), ("gone", "training"), ("c", "validation")):
        if video_id != "gone":
            write_video(folder / f"{video_id}.mp4")
        annotations = [{"segment": [0.5, 2.4], "label": "run"}, {"segment": [0, 1], "label": "Ambiguous"}]
        database[video_id] = {"subset": subset, "duration": 2.0, "annotations": annotations}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    return ["--videos", str(folder), "--annotations", str(folder / "annotations.json")]


@pytest.fixture(scope="module")
def built(given, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    with pytest.raises(SystemExit) as end:
        main(["shards", "build", *given, "--out", str(out), "--max-rejected", "0.5", "--workers", "1"])
    assert end.value.code == 0
    return out


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["shards", *map(str, arguments)])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_build_makes_a_folder_per_subset_by_the_catalog(built):
    training, validation = (open_shards(built / name) for name in ("training", "validation"))
    assert (len(training.videos), len(validation.videos)) == (2, 1)
    assert training.manifest.encoding.sampling == FramesPerSecond(15.0)
    assert training.classes == validation.classes == ("run",)


def test_building_again_reports_the_same_and_says_when_too_many_are_rejected(capsys, given, built):
    status, out, err = run(capsys, "build", *given, "--out", built)
    assert status == 3
    assert '4 segments labelled "Ambiguous" skipped' in out
    assert "4 segments that end a little after their video cut to its end" in out
    assert f"{built}/training: own training, 2 videos, 0.00 h, 15 frames per second, short side 256, 1 classes" in out
    assert "rejected gone: there is no file of this name" in err
    assert "training: 1 of 3 videos cannot be used, more than the share of 0.05" in err


def test_two_do_not_build_one_folder_at_once_unless_they_are_parts(capsys, given, built, tmp_path):
    with locked(tmp_path / "training"):
        status, _, err = run(capsys, "build", *given, "--out", tmp_path, "--subsets", "training")
        assert (status, f"{tmp_path}/training is in use by" in err) == (2, True)
    with locked(built / "training" / ".reports" / "part-0-of-2"):
        assert run(capsys, "build", *given, "--out", built, "--subsets", "training", "--part", "1/2")[0] == 3
    assert not (tmp_path / "training" / "lock").exists()
    with locked(tmp_path / "training" / ".reports" / "part-1-of-2"):
        status, _, err = run(capsys, "build", *given, "--out", tmp_path, "--subsets", "training", "--part", "1/2")
        assert (status, "part-1-of-2 is in use by" in err) == (2, True)


def test_list_and_verify_say_what_is_there_and_whether_it_is_sound(capsys, built, tmp_path):
    status, out, _ = run(capsys, "list", built / "training", built / "validation")
    assert (status, len(out.splitlines())) == (0, 2)
    status, out, _ = run(capsys, "verify", built / "validation")
    assert (status, "1 videos in 1 shards, every byte as it was built" in out) == (0, True)
    shards = open_shards(built / "training")
    damaged = tmp_path / "training"
    damaged.mkdir()
    for path in shards.root.iterdir():
        if path.is_file():
            (damaged / path.name).write_bytes(path.read_bytes())
    video = shards.videos[0]
    tar = bytearray((damaged / video.shard).read_bytes())
    tar[video.offset + video.num_bytes - 600] ^= 1
    (damaged / video.shard).write_bytes(tar)
    status, out, err = run(capsys, "verify", damaged)
    assert (status, "2 videos in 1 shards, 2 problems" in out) == (4, True)
    assert f"{video.record.video_id}: crc32 of the mp4 is" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fps", "15", "--frames", "64"], "--fps 15.0 and --frames 64 exclude each other"),
        (["--fps", "0"], "--fps is 0.0; give a rate above 0"),
        (["--frames", "0"], "--frames is 0; give 1 or more"),
        (["--short-side", "255"], "--short-side is 255; give an even number"),
        (["--part", "4/4"], "--part is '4/4'; give i/n"),
        (["--part", "1"], "--part is '1'; give i/n"),
        (["--workers", "0"], "--workers is 0; give 1 or more"),
        (["--shard-size", "2 miles"], "--shard-size is '2 miles'; give a size such as 2GB or 500MB"),
        (["--shard-size", "0"], "--shard-size is '0'; give a size"),
        (["--copy", "--frames", "64"], "--copy keeps all frames of a file, --frames 64 does not"),
        (["--max-rejected", "5"], "--max-rejected is 5.0; give a number from 0 to 1"),
        (["--dataset", "kinetics"], "unknown data set 'kinetics'; known:"),
        (["--dataset", "thumos14"], "label is 'run': it is not among the classes"),
        (
            ["--subsets", "test"],
            "no video belongs to subset 'test'; the annotation file has ['training', 'validation']",
        ),
        (["--annotations", "nowhere.json"], "nowhere.json is not a file"),
        (["--videos", "nowhere"], "nowhere is not a folder"),
        (["--blocked", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, given, tmp_path, options, message):
    status, _, err = run(capsys, "build", *given, "--out", tmp_path, *options)
    assert (status, err.count("re2tal: ")) == (2, 1)
    assert message in err
    assert "Traceback" not in err


def test_clips_in_folders_become_subsets_of_videos_with_one_action(capsys, tmp_path):
    for subset, label, name in (("train", "pour tea", "a"), ("train", "run", "b"), ("val", "run", "c")):
        (tmp_path / "clips" / subset / label).mkdir(parents=True)
        write_video(tmp_path / "clips" / subset / label / f"{name}.mp4")
    status, out, _ = run(capsys, "build", "--clips", tmp_path / "clips", "--out", tmp_path / "out", "--workers", 1)
    assert status == 0
    assert f"{tmp_path}/out/training: own training, 2 videos" in out
    shards = open_shards(tmp_path / "out" / "validation")
    assert shards.classes == ("pour tea", "run")
    assert [[action.label for action in video.record.actions] for video in shards.videos] == [["run"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --annotations FILE with --videos FOLDER, or --clips FOLDER_OR_FILES"),
        (["--clips", "x", "--annotations", "y"], "give either --annotations FILE with --videos FOLDER, or --clips"),
        (["--annotations", "y"], "--annotations y needs --videos; give the folder that holds the videos"),
        (["--annotations", "y", "--videos", "z", "--classes", "c"], "--classes c is for --clips; the annotation file"),
    ],
)
def test_clips_and_annotations_exclude_each_other(capsys, tmp_path, options, message):
    status, _, err = run(capsys, "build", "--out", tmp_path, *options)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_sizes_are_read_as_people_write_them():
    sizes = {"2GB": 2 * 10**9, "500 mb": 5 * 10**8, "1.5G": 15 * 10**8, "1MiB": 1 << 20, "4096": 4096}
    assert {text: parse_size(text) for text in sizes} == sizes


def test_an_open_of_nothing_is_one_line_and_status_2(capsys, tmp_path):
    for command in ("list", "verify"):
        status, _, err = run(capsys, command, tmp_path / "none")
        assert (status, "none is not a folder" in err) == (2, True)


def test_blocked_ids_come_from_a_list_or_lines(capsys, given, tmp_path):
    (tmp_path / "ids.json").write_text('["a", "gone"]')
    (tmp_path / "ids.txt").write_text("gone\na\n")
    for name in ("ids.json", "ids.txt"):
        options = [*given, "--out", tmp_path / name[4:], "--subsets", "training", "--frames", "8", "--part", "1/2"]
        status, out, _ = run(capsys, "build", *options, "--blocked", tmp_path / name)
        assert (status, "training: 1 of 1 shards are still to be built" in out) == (0, True)
    (tmp_path / "ids.json").write_text('{"a": 1}')
    status, _, err = run(capsys, "build", *given, "--out", tmp_path, "--blocked", tmp_path / "ids.json")
    assert (status, "ids.json is not a JSON list of video ids" in err) == (2, True)


def test_the_sampling_in_a_manifest_reads_back_as_what_it_was():
    assert to_json(FramesPerVideo(768)) == '{"num_frames":768}'


def _submit(tmp_path: Path, **slurm: str) -> subprocess.CompletedProcess:
    """Run the script as sbatch does, with an srun that prints its arguments."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/usr/bin/env bash\nprintf "%s|" "$@"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "RE2TAL_VENV": "venv",
        **slurm,
    }
    command = ["bash", str(SCRIPT), "--videos", "my videos", "--out", "o"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_an_array_task_builds_its_part(tmp_path):
    task = {
        "SLURM_ARRAY_TASK_ID": "12",
        "SLURM_ARRAY_TASK_MIN": "10",
        "SLURM_ARRAY_TASK_MAX": "17",
        "SLURM_ARRAY_TASK_COUNT": "8",
        "SLURM_CPUS_PER_TASK": "16",
    }
    done = _submit(tmp_path, **task)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "--cpus-per-task=16|--kill-on-bad-exit=1|"
        "re2tal|shards|build|--videos|my videos|--out|o|--part|2/8|--workers|16|"
    )


def test_an_array_with_gaps_or_no_array_is_refused(tmp_path):
    gaps = {
        "SLURM_ARRAY_TASK_ID": "4",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_MAX": "8",
        "SLURM_ARRAY_TASK_COUNT": "5",
    }
    done = _submit(tmp_path, **gaps)
    assert (done.returncode, "one range without gaps" in done.stderr) == (2, True)
    done = subprocess.run(
        ["bash", str(SCRIPT)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "start it with sbatch" in done.stderr


def test_labels_that_look_alike_end_the_build_before_it_begins_and_can_be_folded(capsys, given, tmp_path):
    document = json.loads(Path(given[3]).read_text())
    document["database"]["b"]["annotations"][0]["label"] = "Run "
    changed = tmp_path / "annotations.json"
    changed.write_text(json.dumps(document))
    options = ["build", *given[:3], changed, "--out", tmp_path / "out", "--max-rejected", "0.5", "--workers", "1"]
    status, _, err = run(capsys, *options)
    assert status == 2
    assert "labels 'run' (3 times) and 'Run ' (1 times) differ only by case" in err
    assert not (tmp_path / "out").exists()
    status, out, _ = run(capsys, *options, "--fix-labels", "--subsets", "val")
    assert status == 0
    assert "label 'Run ' read as 'run'" in out
    assert open_shards(tmp_path / "out" / "validation").classes == ("run",)


def test_a_subset_folder_is_found_by_its_other_name_or_what_is_there_is_listed(built, tmp_path):
    assert subset_folder(built, "train") == built / "training"
    assert subset_folder(built, "val") == built / "validation"
    with pytest.raises(ValueError, match=r"no subset 'test'; it has \['training', 'validation'\]"):
        subset_folder(built, "test")
