"""`re2tal init`: what it chooses follows from the data, and what cannot be learnt from is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data.numbered import encode_numbered
from safetensors.torch import save_file

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.cli import main
from re2tal.config import load_config
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.rewire import RewiringConfig
from re2tal.runs.initialisation import initialise
from re2tal.runs.initialisation_facts import DataFacts, look_at
from re2tal.runs.initialisation_settings import Start, choose


def facts(lengths: list[float], *, longest_video: float = 600.0, fps: float = 30.0, sided: tuple[str, ...] = ()):
    return DataFacts(
        classes=("a", "b"),
        num_training=100,
        action_seconds=np.sort(lengths),
        video_seconds=np.array([longest_video]),
        least_fps=fps,
        short_side=240,
        sided=sided,
        notes=(),
    )


def write(path: Path, entries: dict[str, tuple[str, list[tuple[float, float, str]]]]) -> Path:
    database = {
        name: {
            "subset": subset,
            "duration": 3.0,
            "annotations": [{"segment": [start, end], "label": label} for start, end, label in actions],
        }
        for name, (subset, actions) in entries.items()
    }
    path.write_text(json.dumps({"database": database}))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in ("one", "two"):
        (folder / f"{name}.mp4").write_bytes(encode_numbered(75, fps=25))
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.mark.parametrize(
    ("lengths", "settings", "frames", "rate"),
    [
        # 20 of 20 s: 1.5 x 20 s at 8 a second is 240 frames, 256 in units of 32.
        ([20.0] * 20, {}, 256, 8.0),
        # 0.4 s needs 10 frames a second for two steps of two frames; 1.5 x 0.4 s is below the shortest window.
        ([0.4] * 20, {}, 32, 10.0),
        # 90 s at 8 a second: 1080 frames, which are too many, so 6 a second: 810, 832 in units of 64.
        ([90.0] * 20, {}, 832, 6.0),
        # No window is longer than the longest video: 12 s at 8 a second.
        ([20.0] * 20, {"longest_video": 12.0}, 96, 8.0),
        # The rate is never above that of the slowest video.
        ([0.1] * 20, {"fps": 12.5}, 32, 12.0),
    ],
)
def test_windows_follow_from_the_lengths_of_actions(lengths, settings, frames, rate):
    windowing = choose(facts(lengths, **settings), Start()).config.data.clips.windowing
    assert isinstance(windowing, Slide)
    assert (windowing.num_frames, windowing.frames_per_second) == (frames, rate)


def test_actions_too_long_for_any_window_are_seen_in_whole_videos():
    chosen = choose(facts([400.0] * 20), Start())
    assert isinstance(chosen.config.data.clips.windowing, ResizeWhole)
    assert chosen.stored_fps is None
    assert any("too long for a window" in why for _, _, why in chosen.reasons)


def test_a_mirror_is_off_where_labels_name_sides(videos: Path, tmp_path: Path):
    actions = [
        (0.1, 1.0, "TurnLeft"),
        (1.0, 2.0, "turn_right"),
        (1.0, 2.0, "bright copyright"),
        (0.0, 1.0, "clockwise"),
    ]
    path = write(tmp_path / "a.json", {"one": ("training", actions), "two": ("validation", actions)})
    found = look_at(videos, path)
    assert found.sided == ["TurnLeft", "clockwise", "turn_right"]
    assert not choose(found, Start()).config.data.clips.flip
    assert choose(facts([1.0]), Start()).config.data.clips.flip


def test_plain_weights_become_rewired_over_some_epochs_and_rewired_ones_stay(monkeypatch: pytest.MonkeyPatch):
    place = "re2tal.runs.initialisation_settings.trained_wiring"
    monkeypatch.setattr(place, lambda config: None)
    plain = choose(facts([5.0]), Start(weights="swin_tiny.pth")).config
    assert (plain.backbone.name, plain.backbone.norm_eval, plain.annealing.epochs) == ("swin3d_tiny", True, 5.0)
    wiring = {"segment": 2, "merge": "extrapolate"}
    assert RewiringConfig(**wiring)
    monkeypatch.setattr(place, lambda config: wiring)
    rewired = choose(facts([5.0]), Start(weights="swin_tiny.pth")).config
    assert (rewired.backbone.segment, rewired.backbone.merge, rewired.annealing.epochs) == (2, "extrapolate", 0.0)


def test_the_file_is_one_that_training_takes_and_each_choice_has_a_reason(videos: Path, tmp_path: Path, capsys):
    actions = [(0.1, 1.0, "jump"), (1.0, 2.5, "run")]
    entries = {
        "one": ("training", actions),
        "broken": ("training", actions),
        "gone": ("training", actions),
        "two": ("validation", [*actions, (0.0, 1.0, "fly")]),
    }
    out = tmp_path / "own" / "recipe.json"
    arguments = ["init", str(videos), str(write(tmp_path / "a.json", entries)), "--out", str(out)]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    config = load_config(out)
    assert config.name == "recipe"
    assert config.data.shards == tmp_path / "own" / "shards"
    assert config.engine.batch_size == 1  # two training videos
    said = capsys.readouterr().out
    for part in ("data.clips.windowing: windows of 32 frames", "engine.batch_size: 1", "data.clips.flip: true"):
        assert part in said
    assert "1 annotated videos have no file" in said
    assert "1 of 3 files cannot be used" in said
    assert "1 class ('fly') in the validation subset only" in said
    assert f"re2tal train --config {out} --out runs/recipe" in said
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "recipe.json is there already" in capsys.readouterr().err


def test_a_video_that_cannot_be_measured_is_left_out_as_by_a_build(videos: Path, tmp_path: Path):
    action = {"segment": [0, 1], "label": "a"}
    names = {"one.mp4": "training", "two": "validation", "broken": "training", "gone": "validation"}
    database = {name: {"subset": subset, "annotations": [action]} for name, subset in names.items()}
    (tmp_path / "a.json").write_text(json.dumps({"database": database}))
    (tmp_path / "videos").mkdir()
    for path in videos.iterdir():
        (tmp_path / "videos" / path.name).symlink_to(path)
    (tmp_path / "videos" / "one.mkv").symlink_to(videos / "broken.mp4")
    found = look_at(tmp_path / "videos", tmp_path / "a.json")
    assert (found.num_training, found.video_seconds.tolist()) == (1, [3.0, 3.0])
    assert [note.partition(";")[0] for note in found.notes[:1]] == ["1 annotated videos have no file"]
    assert found.notes[1].startswith("1 of 3 files cannot be used, such as: ")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"one": ("training", []), "two": ("validation", [])}, "no video has an annotation"),
        ({"one": ("training", []), "two": ("validation", [(0, 1, "a")])}, "its training subset has an action"),
        ({"one": ("training", [(0, 1, "a")])}, "--validation 0.2 --out FILE"),
        (
            {"x": ("training", [(0, 1, "a")]), "y": ("validation", [(0, 1, "a")])},
            "has no file of the 2 videos in .*, such as 'x'",
        ),
        (
            {"broken": ("training", [(0, 1, "a")]), "y": ("validation", [(0, 1, "a")])},
            r"none of the videos can be used; the first: .*broken\.mp4",
        ),
    ],
)
def test_data_that_nothing_can_be_learnt_from_is_refused(videos: Path, tmp_path: Path, entries, message: str):
    with pytest.raises(ValueError, match=message):
        look_at(videos, write(tmp_path / "a.json", entries))


@pytest.mark.parametrize(
    ("backbone", "weights"),
    # The library has no InternVideo2, so that nothing is on a hub.
    [(None, "gone.pth"), ("videomae_base", "gone.pth"), ("internvideo2_1b", "OpenGVLab/InternVideo2")],
)
def test_weights_that_are_not_there_are_refused_before_anything_is_written(
    videos: Path, tmp_path: Path, backbone, weights
):
    out, start = tmp_path / "recipe.json", Start(backbone, weights)
    with pytest.raises(FileNotFoundError, match=rf"--weights is {weights}, and there is no such file; .* correct"):
        initialise(videos, tmp_path / "a.json", out, shards=None, start=start)
    assert not out.exists()


def test_weights_of_another_family_are_refused_before_the_data_is_looked_at(tmp_path: Path):
    from transformers import VivitConfig

    folder, file = tmp_path / "vivit", tmp_path / "swin.safetensors"
    VivitConfig().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    swin = build_backbone(BackboneConfig(name="swin3d_nano", rewired=False))
    save_file({name: value.contiguous() for name, value in swin.state_dict().items()}, file)
    for backbone, weights, message in (
        ("timesformer_base", folder, "holds a model of type 'vivit', this backbone is 'timesformer'; choose"),
        ("slowfast_nano", file, "is not a checkpoint of SlowFast in a layout we know"),
    ):
        start = Start(backbone, str(weights))
        with pytest.raises(ValueError, match=message):
            initialise(tmp_path / "gone", tmp_path / "a.json", tmp_path / "recipe.json", shards=None, start=start)
