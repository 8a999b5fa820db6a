"""`re2tal detect` and `re2tal report` on a run folder with an untrained network: real videos, every step of the way."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.folders import indexed, write_shards
from data.numbered import encode_numbered

import re2tal
from re2tal.backbones import BackboneConfig
from re2tal.cli.detect import detect
from re2tal.cli.evaluate import evaluate
from re2tal.cli.report import report
from re2tal.config import DataConfig, RunConfig, build_detector, save_config
from re2tal.data.contract.manifest import FramesPerSecond, FramesPerVideo
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.evaluation.results import read_results
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.runs.comparison import ComparisonOptions
from re2tal.runs.comparison import compare as compare_results
from re2tal.runs.detection_job import DetectionOptions
from re2tal.runs.trained import load_detector
from re2tal.runs.video_files import encoding_for
from re2tal.structures import Action
from re2tal.training.export import write_model

CLASSES = ("jump", "run <fast>")


def config(root: Path) -> RunConfig:
    clips = ClipConfig(windowing=Slide(num_frames=16, frames_per_second=8.0), size=32, fit="stretch", workers=0)
    localizer = ActionFormerConfig(
        channels=16,
        num_embedding_convs=1,
        num_stem_blocks=1,
        max_num_steps=8,
        regression_ranges=((0, 4), (4, 10_000)),
    )
    return RunConfig(
        name="tiny",
        num_steps=8,
        data=DataConfig(shards=root / "shards", clips=clips),
        backbone=BackboneConfig(name="swin3d_nano"),
        localizer=localizer,
        suppression=SuppressionConfig(max_per_video=5),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it, with random weights, and two validation videos of 3 and 5 seconds."""
    settings = config(tmp_path)
    videos = {
        name: (encode_numbered(int(seconds * 30)), indexed(int(seconds * 30), video_id=name, actions=actions))
        for name, seconds, actions in (
            ("first", 3, [Action(0.5, 1.5, CLASSES[0])]),
            ("second", 5, [Action(1.0, 4.0, CLASSES[1])]),
        )
    }
    write_shards(tmp_path / "shards" / "validation", videos, per_shard=1, classes=CLASSES)
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(folder / "config.json", settings)
    torch.manual_seed(0)
    weights = build_detector(settings, CLASSES).state_dict()
    write_model(folder / "model.safetensors", weights, classes=CLASSES)
    rows = [{"step": step, "kind": "train", "loss": 1 / step, "lr/backbone": 1e-3} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_runs_own_validation_videos_are_detected_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert detect(run=run, device="cpu", batch_size=2) == 0
    results = read_results(run / "results.json")
    assert list(results.predictions) == ["first", "second"]
    assert set(results.classes) <= set(CLASSES)
    for video_id, seconds in (("first", 3), ("second", 5)):
        found = results.predictions[video_id]
        assert 1 <= len(found) <= 5
        assert found.segments.min() >= 0
        assert found.segments.max() <= seconds
    report(run=run)
    page = (run / "report" / "index.html").read_text()
    assert page.count("<img") == 3
    assert "run &lt;fast&gt;" in page
    assert "run <fast>" not in page
    assert sorted(path.name for path in (run / "report" / "timelines").iterdir()) == [
        "0000_first.png",
        "0001_second.png",
    ]
    assert (run / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    cut = r"2 videos reach the limit of detections \(suppression\.max_per_video\), which left out up to [1-9]\d* more"
    assert len(re.findall(cut, said)) == 2  # in what detect says, and as a note of the report
    assert "(protocol opentad)" in said
    assert ": 2 videos; no blocked list; by class" in said
    assert "average mAP" in said


def agnostic(run: Path, tmp_path: Path) -> RunConfig:
    """The run folder becomes that of a class-agnostic detector."""
    settings = config(tmp_path)
    settings = replace(settings, localizer=replace(settings.localizer, class_agnostic=True))
    save_config(run / "config.json", settings)
    torch.manual_seed(0)
    detector = build_detector(settings, CLASSES)
    write_model(run / "model.safetensors", detector.state_dict(), classes=detector.localizer.classes)
    return settings


def test_a_classifier_of_whole_videos_names_what_a_class_agnostic_detector_finds(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agnostic(run, tmp_path)
    document = {"results": {"first": [0.75, 0.25], "second": [0.0, 1.0]}, "class": list(CLASSES)}
    (tmp_path / "cuhk.json").write_text(json.dumps(document))
    assert detect(run=run, device="cpu", wanted=DetectionOptions(out=tmp_path / "plain.json")) == 0
    assert detect(run=run, device="cpu", wanted=DetectionOptions(video_classes=tmp_path / "cuhk.json", top_k=1)) == 0
    plain, named = read_results(tmp_path / "plain.json"), read_results(run / "results.json")
    assert plain.classes == ("action",)
    assert named.classes == CLASSES
    for video_id, factor in (("first", 0.75), ("second", 1.0)):
        one, other = plain.of(video_id), named.of(video_id)
        assert torch.equal(other.segments, one.segments)
        torch.testing.assert_close(other.scores, factor * one.scores, rtol=1e-6, atol=0)
        assert {named.classes[label] for label in other.labels} == {dict(first="jump", second=CLASSES[1])[video_id]}
    truths = {"first": ([0.5, 1.5], CLASSES[0], 3), "second": ([1.0, 4.0], CLASSES[1], 5)}
    database = {
        name: {"subset": "validation", "duration": seconds, "annotations": [{"segment": segment, "label": label}]}
        for name, (segment, label, seconds) in truths.items()
    }
    (tmp_path / "truth.json").write_text(json.dumps({"database": database}))
    evaluate(
        predictions=run / "results.json",
        annotations=tmp_path / "truth.json",
        options=re2tal.ScoringOptions(protocol="official"),
        json=tmp_path / "figures.json",
    )
    scored = json.loads((tmp_path / "figures.json").read_text())["classes"]
    assert {name: row["predictions"] for name, row in scored.items()} == {
        CLASSES[0]: len(plain.of("first")),
        CLASSES[1]: len(plain.of("second")),
    }
    report(run=run)
    assert "run &lt;fast&gt;" in (run / "report" / "index.html").read_text()


def test_a_classifier_that_does_not_fit_is_refused_before_anything_is_detected(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "cuhk.json"
    path.write_text(json.dumps({"results": {"first": [1.0, 0.0]}, "class": list(CLASSES)}))
    with pytest.raises(ValueError, match=r"video classes, .*cuhk\.json, were given, but .*class_agnostic is false"):
        detect(run=run, device="cpu", wanted=DetectionOptions(video_classes=path))
    agnostic(run, tmp_path)
    with pytest.raises(ValueError, match=r"top_k is 3; .*cuhk\.json has 2 classes"):
        detect(run=run, device="cpu", wanted=DetectionOptions(video_classes=path, top_k=3))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "third.mp4").write_bytes(encode_numbered(48, fps=24))
    with pytest.raises(ValueError, match=r"cuhk\.json: results\['third'\] is missing"):
        detect(run=run, device="cpu", videos=tmp_path / "videos", wanted=DetectionOptions(video_classes=path))
    assert not (run / "results.json").exists()


def test_videos_that_the_classifier_lacks_are_left_out_and_named(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agnostic(run, tmp_path)
    path = tmp_path / "cuhk.json"
    path.write_text(json.dumps({"results": {"v_first": [0.5, 0.25]}, "classes": list(CLASSES)}))
    assert (
        detect(run=run, device="cpu", wanted=DetectionOptions(video_classes=path, top_k=1, fusion="square-root")) == 0
    )
    assert "no scores of 1 of the 2 videos, so their detections are left out, and count as missed: 'second'" in (
        caplog.text
    )
    results = read_results(run / "results.json")
    assert results.of("first").scores.numel() > 0
    assert results.of("second").scores.numel() == 0


def test_mirror_images_are_looked_at_on_request(run: Path, tmp_path: Path) -> None:
    for name, flip in (("plain", False), ("flip", True), ("again", True)):
        assert detect(run=run, device="cpu", wanted=DetectionOptions(flip=flip, out=tmp_path / f"{name}.json")) == 0
    plain, flip, again = (read_results(tmp_path / f"{name}.json").of("first") for name in ("plain", "flip", "again"))
    assert not torch.equal(plain.scores, flip.scores)
    assert torch.equal(flip.scores, again.scores)


def test_results_in_a_run_folder_are_compared_on_its_validation_videos(run: Path, tmp_path: Path) -> None:
    detect(run=run, device="cpu")
    detect(run=run, device="cpu", wanted=DetectionOptions(flip=True, out=tmp_path / "flip.json"))
    a, b = run / "results.json", tmp_path / "flip.json"
    found = compare_results(a, b, options=ComparisonOptions(draws=20, seeds_of_b=(a,)))
    assert found.num_runs == (1, 2)
    assert ": 2 videos; no blocked list; by class" in found.facts
    assert "20 draws of videos and of 1 and 2 runs" in str(found)


def test_the_size_of_a_batch_changes_nothing(run: Path, tmp_path: Path) -> None:
    for size in (1, 3):
        detect(run=run, device="cpu", batch_size=size, wanted=DetectionOptions(out=tmp_path / f"{size}.json"))
    one, three = (read_results(tmp_path / f"{size}.json").predictions for size in (1, 3))
    for video_id in one:
        torch.testing.assert_close(one[video_id].scores, three[video_id].scores, rtol=1e-4, atol=1e-6)


def test_a_folder_of_videos_of_any_name_is_detected_and_bad_files_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my videos"
    folder.mkdir()
    (folder / "a.b (1) $x.mp4").write_bytes(encode_numbered(75, fps=25))
    (folder / "twin.mp4").write_bytes(encode_numbered(48, fps=24))
    (folder / "twin.mov").write_bytes(encode_numbered(48, fps=24))
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "notes.txt").write_text("not looked at")
    assert detect(run=run, videos=folder, device="cpu") == 1
    results = read_results(run / "detections.json")
    assert sorted(results.predictions) == ["a.b (1) $x", "twin.mov", "twin.mp4"]
    assert results.predictions["a.b (1) $x"].segments.max() <= 3
    assert "left out: broken: cannot be read as a video: " in capsys.readouterr().err


def test_the_backbones_first_weights_are_not_needed(run: Path, tmp_path: Path) -> None:
    settings = config(tmp_path)
    elsewhere = replace(settings, backbone=replace(settings.backbone, weights="/elsewhere/swin.pth"))
    detector = load_detector(run, elsewhere)
    assert detector.localizer.classes == CLASSES


def test_clips_say_how_videos_are_stored() -> None:
    slide = encoding_for(ClipConfig(windowing=Slide(frames_per_second=15.0), size=223))
    assert (slide.sampling, slide.short_side) == (FramesPerSecond(15.0), 224)
    whole = encoding_for(ClipConfig(windowing=ResizeWhole(num_frames=768), size=160))
    assert (whole.sampling, whole.short_side) == (FramesPerVideo(768), 160)


def test_what_cannot_be_done_is_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"videos .* and shards .* were both given"):
        detect(run=run, videos=tmp_path, shards=tmp_path)
    with pytest.raises(ValueError, match=r"empty holds no video file; wanted one of \.mp4"):
        detect(run=run, videos=tmp_path / "empty", device="cpu")
    with pytest.raises(ValueError, match=r"absent is not a folder"):
        detect(run=run, videos=tmp_path / "absent", device="cpu")
    with pytest.raises(ValueError, match=r"none of the 1 videos can be used; x: is empty"):
        detect(run=run, videos=tmp_path / "broken", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"config\.json is not a file"):
        detect(run=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"results\.json is not a file"):
        report(run=run)


def test_annotations_may_come_from_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detect(run=run, device="cpu")
    # Both classes: which one the untrained network gives depends on the version of torch.
    actions = [{"segment": [0, 1], "label": label} for label in ("jump", "run <fast>")]
    annotation = {"subset": "validation", "duration": 3, "annotations": actions}
    (tmp_path / "truth.json").write_text(json.dumps({"database": {"../first": annotation, "second": annotation}}))
    report(run=run, annotations=tmp_path / "truth.json")
    drawn = sorted(path.name for path in (run / "report" / "timelines").iterdir())
    assert drawn == ["0000_second.png", "0001____first.png", "0002_first.png"]  # predicted ones of the truth first
    page = (run / "report" / "index.html").read_text("utf-8")
    assert "predicted videos are not in the subset" in page
    assert "subset validation: 2 videos; no blocked list; by class" in page
    (tmp_path / "truth.json").write_text(json.dumps({"database": {"third": annotation}}))
    capsys.readouterr()
    report(run=run, annotations=tmp_path / "truth.json")
    assert capsys.readouterr().out.startswith("not scored: no predicted video is among those with known actions")
