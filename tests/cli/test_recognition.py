"""From folders of trimmed clips to a recognizer on two ranks, and from its backbone to a detector."""

from __future__ import annotations

import json
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from distributed.ranks import launch_ranks
from safetensors.torch import load_file

import re2tal
from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.cli import main
from re2tal.cli.evaluate import evaluate
from re2tal.cli.import_weights import import_weights
from re2tal.config import RecognitionConfig, build_recognizer, load_run
from re2tal.data.contract.shards import open_shards
from re2tal.data.streaming.stream import stream_clips
from re2tal.evaluation.video_classes import read_video_classes
from re2tal.inference import classify
from re2tal.training.export import read_model

ROOT = Path(__file__).parents[2]
COLOURS = {"mostly red": (200, 40, 40), "mostly blue (dark)": (30, 30, 160)}
SMALL = {
    "recipe": "demo_clips",
    "data.clips.windowing.num-frames": 4,
    "data.clips.size": 16,
    "data.clips.workers": 1,
    "engine.batch-size": 3,
    "training.epochs": 4,
    "training.average-decay": 0.5,
    "training.checkpoint-every-steps": 6,
    "training.log-every-steps": 4,
    "training.evaluate-every-epochs": 2,
    "schedule.warmup-epochs": 0.5,
}


def write_clip(path: Path, colour: tuple[int, int, int], *, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(16))
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(16):
            picture = np.clip(generator.normal(colour, 15, size=(32, 32, 3)), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for subset, count in (("train", 9), ("val", 2)):
        for label, colour in COLOURS.items():
            for number in range(count):
                name = f"{subset}_{label[7]}_{number}.mp4"
                write_clip(folder / "clips" / subset / label / name, colour, seed=number + 100 * count)
    # Not a video: left out, and counted.
    (folder / "clips" / "val" / "mostly red" / "broken.mp4").write_bytes(b"\0" * 100)
    options = ["--clips", str(folder / "clips"), "--dataset", "demo", "--max-rejected", "0.5", "--workers", "1"]
    with pytest.raises(SystemExit) as end:
        main(["shards", "build", *options, "--out", str(folder / "shards")])
    assert end.value.code == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run folder, and the command that made it."""
    out = tmp_path_factory.mktemp("runs") / "recognizer"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--ds", str(ROOT / "ds_configs" / "zero2.json")]
    options = SMALL | {"data.shards": shards, "out": out}
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    launch_ranks(command, world_size=2, timeout_seconds=280)
    return out, command


def test_two_ranks_learn_and_one_rank_finds_the_same_in_their_weights(trained, shards, capsys):
    out, _ = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    judged = [(row["step"], row["top1"]) for row in rows if row["kind"] == "evaluation"]
    assert [step for step, _ in judged] == [6, 12]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["top1"], summary["top5"], summary["mean_class_accuracy"]) == (1, 1, 1)
    assert (summary["videos"], summary["ranks"], summary["steps"]) == (4, 2, 12)
    assert len(open_shards(shards / "validation").manifest.rejected) == 1

    run = load_run(out / "config.json")
    assert isinstance(run, RecognitionConfig)
    model = read_model(out / "model.safetensors")
    recognizer, _ = build_recognizer(run, model.classes)
    model.load_into(recognizer, classes=recognizer.classes)
    clips = stream_clips(open_shards(shards / "validation"), run.data.clips, batch_size=1, training=False)
    found = read_video_classes(out / "results.json")
    assert found.classes == tuple(sorted(COLOURS))
    alone = classify(recognizer, clips.epoch(0), device="cpu")
    assert alone.keys() == found.scores.keys()
    for video_id, probabilities in alone.items():
        torch.testing.assert_close(found.scores[video_id].float(), probabilities)

    facts = json.loads((out / "model.json").read_text())
    assert facts["classes"] == sorted(COLOURS)
    assert facts["preprocessing"]["frames"]["num_views"] == 4
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["tags"][0] == "video-classification"
    assert [one["value"] for one in head["model-index"][0]["results"][0]["metrics"]] == [100.0] * 3
    assert "A recognizer of 2 actions in video" in card
    assert "top-1 100.00 %, top-5 100.00 %" in card

    evaluate(predictions=out / "results.json", shards=shards / "validation", json=out / "figures.json")
    assert capsys.readouterr().out.startswith("top-1 100.00 %   top-5 100.00 %   mean class accuracy 100.00 %")
    assert json.loads((out / "figures.json").read_text())["num_videos"] == 4


def run_command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_a_finished_recognizer_scores_its_validation_clips_again(trained, tmp_path, capsys):
    out, _ = trained
    again = tmp_path / "again.json"
    assert run_command("classify", "--run", out, "--out", again, "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert said.startswith("top-1 100.00 %   top-5 100.00 %   mean class accuracy 100.00 %   of 4 videos\n4 videos; ")
    found, first = read_video_classes(again), read_video_classes(out / "results.json")
    assert (found.classes, found.scores.keys()) == (first.classes, first.scores.keys())
    for video_id, scores in found.scores.items():
        torch.testing.assert_close(scores, first.scores[video_id], rtol=1e-5, atol=1e-6)


def test_new_clips_are_named_and_broken_ones_counted(trained, tmp_path, capsys):
    out, _ = trained
    for number, (label, colour) in enumerate(COLOURS.items()):
        write_clip(tmp_path / "new" / f"{label[7:]} one.mp4", colour, seed=number)
    (tmp_path / "new" / "broken.mp4").write_bytes(b"\0" * 100)
    options = ("--run", out, "--videos", tmp_path / "new", "--out", tmp_path / "new.json", "--top", 2)
    assert run_command("classify", *options, "--device", "cpu") == 1
    captured = capsys.readouterr()
    assert "red one: mostly red 0." in captured.out
    assert "blue (dark) one: mostly blue (dark) 0." in captured.out
    assert "left out: broken.mp4: " in captured.err
    found = read_video_classes(tmp_path / "new.json")
    assert {name: found.classes[int(scores.argmax())] for name, scores in found.scores.items()} == {
        "red one": "mostly red",
        "blue (dark) one": "mostly blue (dark)",
    }
    assert all(scores.sum().item() == pytest.approx(1, abs=1e-5) for scores in found.scores.values())


def test_what_cannot_be_classified_is_said(trained, shards, tmp_path, capsys):
    out, _ = trained
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / "config.json").write_text(json.dumps({"name": "detector"}))
    for options, message in (
        (("--run", out, "--videos", tmp_path, "--shards", shards), "were both given; give one of them"),
        (("--run", out, "--top", 0), "top is 0; give 1 or more"),
        (("--run", out, "--videos", tmp_path), "holds no video file"),
        (("--run", tmp_path / "detector"), "is the run of a detector, which says when something happens too"),
    ):
        assert run_command("classify", *options) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow  # that the trainer resumes to the bit is held on detectors too (tests/cli/test_train.py)
def test_a_resumed_run_ends_with_the_same_weights(trained):
    out, command = trained
    whole = read_model(out / "model.safetensors")
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    outputs = launch_ranks([*command, "--resume"], world_size=2, timeout_seconds=280)
    assert "resumed at step 6 of 12" in outputs[0]
    resumed = read_model(out / "model.safetensors")
    assert all(value.equal(resumed.weights[name]) for name, value in whole.weights.items())


def test_its_backbone_starts_a_detector_and_the_run_is_no_detectors(trained, capsys):
    out, _ = trained
    run = load_run(out / "config.json")
    weights = out / "model.safetensors"
    backbone = build_backbone(type(run.backbone)(name=run.backbone.name, weights=str(weights)))
    trained_weights = read_model(weights).weights
    assert all(torch.equal(value, trained_weights[f"backbone.{name}"]) for name, value in backbone.state_dict().items())
    for command in (["detect", "--device", "cpu"], ["report"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--run", str(out)])
        assert end.value.code == 2
        assert "is of a recognizer, which does not say when something happens" in capsys.readouterr().err


def test_its_backbone_goes_to_other_code_bases(trained, tmp_path):
    out, _ = trained
    assert run_command("export", "--run", out, "--to", "opentad", "--out", tmp_path / "re2.safetensors") == 0
    theirs = load_file(tmp_path / "re2.safetensors")
    ours = read_model(out / "model.safetensors").weights
    name = "layers.0.blocks.1.{}attn.qkv.weight"
    assert torch.equal(theirs[name.format("inv_block.Fm.")], ours["backbone." + name.format("")])
    back = build_backbone(BackboneConfig(name="swin3d_nano", weights=str(tmp_path / "re2.safetensors")))
    assert all(torch.equal(value, ours[f"backbone.{key}"]) for key, value in back.state_dict().items())


def test_commands_for_detectors_say_so(tmp_path):
    with pytest.raises(ValueError, match="give --annotations FILE to score detections, or --shards FOLDER"):
        evaluate(predictions=tmp_path / "results.json")
    with pytest.raises(ValueError, match=r"scores a recognizer, for which --subset, .* mean nothing; leave them out"):
        evaluate(predictions=tmp_path / "results.json", shards=tmp_path, options=re2tal.ScoringOptions(proposals=100))
    with pytest.raises(ValueError, match="is of a recognizer; give a detector's"):
        import_weights(tmp_path / "best.pth", run=RecognitionConfig(), out=tmp_path / "run")
