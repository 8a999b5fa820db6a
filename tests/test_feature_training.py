"""A detector on stored features learns and finds what the detector with the frozen network does."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.feature_folders import write_features
from data.folders import indexed, write_shards
from data.numbered import encode_numbered
from distributed.ranks import launch_ranks

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.cli.detect import detect
from re2tal.cli.export import export
from re2tal.cli.report import report
from re2tal.config import DataConfig, RunConfig, build_detector, load_config, save_config
from re2tal.data.contract.feature_manifest import FramesPerStep, StepsPerVideo
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any
from re2tal.data.streaming.stream import ClipConfig, stream_clips
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.inference import detector_input, predict
from re2tal.localizers import LocalizerConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.localizers.vsgn.config import VSGNConfig
from re2tal.recipes import find_recipe
from re2tal.runs.feature_extraction import Extract, extract
from re2tal.runs.stored_features import check_kind, check_pair, describe, on_features
from re2tal.structures import Action
from re2tal.training.annealing import AnnealingConfig
from re2tal.training.export import read_model, write_model

ROOT = Path(__file__).parents[1]
ACTIONS = [Action(0.2, 0.9, "jump"), Action(0.5, 1.0, "run")]
ACTIONFORMER = ActionFormerConfig(
    channels=16,
    num_embedding_convs=1,
    num_stem_blocks=1,
    max_num_steps=8,
    regression_ranges=((0, 4), (4, 10_000)),
    step_supervision=1.0,
)
VSGN = VSGNConfig(channels=32, num_groups=4, num_levels=2, num_neighbours=2, num_head_convs=1)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> ShardSet:
    """Videos that one window of 16 frames, 15 a second, holds exactly: 32 frames of 30 a second."""
    root = tmp_path_factory.mktemp("shards")
    for subset in ("training", "validation"):
        given = {name: (encode_numbered(32), indexed(32, actions=ACTIONS)) for name in ("a", "b")}
        write_shards(root / subset, given, per_shard=1, classes=("jump", "run"))
    opened = open_any(root / "training")
    assert isinstance(opened, ShardSet)
    return opened


def config(shards: Path, localizer: LocalizerConfig = ACTIONFORMER) -> RunConfig:
    clips = ClipConfig(
        windowing=Slide(16, frames_per_second=15.0, shortest_crop=1.0),
        size=32,
        fit="stretch",
        crop_area=(1, 1),
        flip=False,
        workers=0,
    )
    return RunConfig(
        name="tiny",
        num_steps=8,
        data=DataConfig(shards=shards, clips=clips),
        backbone=BackboneConfig(name="swin3d_nano", frozen=True),
        localizer=localizer,
    )


@pytest.fixture(scope="module")
def features(videos, tmp_path_factory) -> FeatureSet:
    out = tmp_path_factory.mktemp("features")
    backbone = BackboneConfig(name="swin3d_nano", frozen=True)
    given = {"window_frames": 16, "fps": 15.0, "size": 32, "fit": "stretch", "workers": 0, "device": "cpu"}
    folders = (videos.root, videos.root.parent / "validation")
    # The validation shards of these tests say that they are of the training subset, so they take a folder of their own.
    for folder in folders:
        extract(Extract((folder,), out / folder.name, backbone=backbone, dtype="float32", **given))
        (out / folder.name / "training").rename(out / f"{folder.name}.moved")
        (out / folder.name).rmdir()
        (out / f"{folder.name}.moved").rename(out / folder.name)
    opened = open_any(out / "training")
    assert isinstance(opened, FeatureSet)
    return opened


@pytest.mark.parametrize("localizer", [ACTIONFORMER, VSGN], ids=lambda one: one.name)
def test_losses_and_detections_are_those_of_the_frozen_network_on_the_same_clips(videos, features, localizer):
    run = config(videos.root.parent, localizer)
    torch.manual_seed(0)
    whole = build_detector(run, videos.classes).train()
    # The extraction drew its network from the same seed.
    torch.manual_seed(0)
    own = build_backbone(run.backbone).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in whole.backbone.state_dict().items())

    of_steps = on_features(run, features)
    assert of_steps.data.clips.windowing == Slide(8, frames_per_second=7.5, shortest_crop=1.0)
    alone = build_detector(of_steps, videos.classes).train()
    alone.localizer.load_state_dict(whole.localizer.state_dict())
    losses = []
    for detector, run_of, data in ((whole, run, videos), (alone, of_steps, features)):
        (batch,) = stream_clips(data, run_of.data.clips, batch_size=2, training=True, seed=3).epoch(0)
        torch.manual_seed(1)
        outputs = detector(detector_input(batch, dtype=torch.float32), batch.mask)
        losses.append(detector.loss(outputs, batch.actions, batch.timelines, num_frames=batch.mask.shape[1]))
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=2e-5, atol=1e-6)

    found = [
        predict(
            detector,
            stream_clips(data, run_of.data.clips, batch_size=2, training=False).epoch(0),
            suppression=run.suppression,
            device="cpu",
        )
        for detector, run_of, data in ((whole, run, videos), (alone, of_steps, features))
    ]
    assert list(found[0]) == list(found[1]) == ["a", "b"]
    for video_id, detections in found[0].items():
        assert len(detections) == len(found[1][video_id])
        torch.testing.assert_close(found[1][video_id].scores, detections.scores, rtol=1e-4, atol=1e-5)


def spec_with(features: FeatureSet, **changes) -> FeatureSet:
    spec = replace(features.manifest.features, **changes)
    return replace(features, manifest=replace(features.manifest, features=spec))


def test_recipes_keep_the_length_of_their_windows_on_features(features):
    demo = on_features(find_recipe("demo"), features)  # steps of 2/15 s: 8 s are 60 of them
    assert demo.data.clips.windowing == replace(
        find_recipe("demo").data.clips.windowing, num_frames=60, frames_per_second=1 / (2 / 15)
    )
    assert demo.backbone == BackboneConfig(name="features", feature_channels=96, rewired=False)
    assert on_features(demo, features) is demo
    whole = replace(find_recipe("activitynet_re2swin_tiny"), annealing=AnnealingConfig(epochs=5.0))
    for grid, num_steps in ((StepsPerVideo(384), 384), (StepsPerVideo(100), 192), (FramesPerStep(16), 192)):
        windowing = on_features(whole, spec_with(features, grid=grid)).data.clips.windowing
        assert windowing == ResizeWhole(num_steps, shortest_action=0.01)
    with pytest.raises(ValueError, match=r"cannot be counted in steps .*StepsPerVideo.*; take a recipe for features"):
        on_features(find_recipe("demo"), spec_with(features, grid=StepsPerVideo(100)))


def test_runs_and_data_that_do_not_go_together_are_refused(videos, features):
    run = config(videos.root.parent)
    of_steps = on_features(run, features)
    check_kind(run, videos)
    check_kind(of_steps, features)
    with pytest.raises(ValueError, match=r"holds features, but this run's backbone, swin3d_nano, takes vid"):
        check_kind(run, features)
    with pytest.raises(ValueError, match=r"holds videos, but this run's backbone is 'features': it takes stored feat"):
        check_kind(of_steps, videos)
    with pytest.raises(ValueError, match=r"holds features of 5 channels, this run takes 96 .*give the features it"):
        check_kind(of_steps, spec_with(features, channels=5))
    with pytest.raises(ValueError, match=r"hold other features: channels is 96 and 5; extract or pack both alike"):
        check_pair(features, spec_with(features, channels=5))
    origin = features.manifest.features.origin
    other = replace(origin, settings=origin.settings | {"rewired": False})
    with pytest.raises(ValueError, match=r"the backbone's wiring is .*'rewired': True, .* and .*'rewired': False"):
        check_pair(features, spec_with(features, origin=other))
    with pytest.raises(ValueError, match="holds features, but this run's backbone, swin3d_nano"):
        check_kind(find_recipe("demo_clips"), features)
    detector = build_detector(of_steps, ("jump", "run"))
    with pytest.raises(ValueError, match=r"takes stored features of shape \(B, 96, T\), got \(1, 3, 16, 32, 32\)"):
        detector(torch.zeros(1, 3, 16, 32, 32), torch.ones(1, 16, dtype=torch.bool))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (BackboneConfig(name="features", rewired=False), "feature_channels is None; give the number of channels"),
        (BackboneConfig(name="features", feature_channels=8), "there is no network to load weights into or to rewire"),
        (
            BackboneConfig(name="features", feature_channels=8, rewired=False, adapter="lora"),
            "no network that adapters could train in; set backbone.adapter to 'none', it is 'lora'",
        ),
        (BackboneConfig(name="swin3d_nano", feature_channels=8), "swin3d_nano is a network, which knows its channels"),
    ],
)
def test_half_a_network_is_refused(backbone, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(backbone)


def test_detecting_needs_features_where_the_run_was_trained_on_them(videos, features, tmp_path):
    run = on_features(config(features.root.parent), features)
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(folder / "config.json", run)
    assert load_config(folder / "config.json") == run
    write_model(
        folder / "model.safetensors", build_detector(run, features.classes).state_dict(), classes=features.classes
    )
    assert detect(run=folder, device="cpu") == 0
    assert sorted(json.loads((folder / "results.json").read_text())["results"]) == ["a", "b"]
    (folder / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0, "lr/localizer": 0.1}\n')
    report(run=folder)
    page = (folder / "report" / "index.html").read_text()
    assert "<dt>Backbone</dt><dd>none</dd>" in page
    assert re.search(r"<dt>Clips</dt><dd>\d+ steps of stored features</dd>", page)
    with pytest.raises(ValueError, match=r"was trained on stored features, so it has no backbone"):
        export(run=folder, to="opentad", out=tmp_path / "out.safetensors")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "one.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no network that looks at videos; .* extract their features .*shards"):
        detect(run=folder, videos=tmp_path / "new", device="cpu")
    with pytest.raises(ValueError, match="holds videos, but this run's backbone is 'features'"):
        detect(run=folder, shards=videos.root, device="cpu")
    with pytest.raises(ValueError, match="the backbone is 'features', which is no network"):
        extract(Extract((videos.root,), tmp_path / "out", run=folder))


def test_detecting_refuses_features_of_another_network(features, tmp_path):
    run = on_features(config(features.root.parent), features)
    save_config(tmp_path / "config.json", run)
    weights = build_detector(run, features.classes).state_dict()
    described = describe(features)
    write_model(tmp_path / "model.safetensors", weights, classes=features.classes, features=described)
    assert detect(run=tmp_path, device="cpu") == 0
    for changes, difference in (
        ({"weights_sha256": "f" * 64}, "weights_sha256 is [0-9a-f]{64} and f{64}"),
        ({"grid": "StepsPerVideo(num_steps=7)"}, "grid is SecondsPerStep.* and StepsPerVideo.*"),
        ({"clips": described["clips"] | {"size": 7}}, "clips is .* and .*'size': 7.*"),
    ):
        trained_on = described | {"of": "slowfast_r50 (weights: elsewhere.pth)"} | changes
        write_model(tmp_path / "model.safetensors", weights, classes=features.classes, features=trained_on)
        message = (
            rf"holds features of swin3d_nano \(weights: .*\), and .* of slowfast_r50 .*: {difference}; give features"
        )
        with pytest.raises(ValueError, match=message):
            detect(run=tmp_path, shards=features.root, device="cpu")
    # The words do not matter: the same weights may lie in another file.
    write_model(
        tmp_path / "model.safetensors", weights, classes=features.classes, features=described | {"of": "elsewhere.pth"}
    )
    assert detect(run=tmp_path, shards=features.root, device="cpu") == 0


def test_two_ranks_train_on_features_by_the_same_command(tmp_path):
    for number, subset in enumerate(("training", "validation")):
        generator = torch.Generator().manual_seed(number)
        values = {f"{subset}{n}": torch.randn(12, 20 + n, generator=generator) for n in range(4)}
        write_features(tmp_path / "features" / subset, values, actions=[Action(1.0, 3.0, "jump")], classes=("jump",))
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--ds", str(ROOT / "ds_configs" / "zero2.json")]
    out = tmp_path / "run"
    small = ["--localizer.channels", "16", "--engine.batch-size", "1", "--training.epochs", "2", "--data.clips.workers"]
    small += ["0", "--training.checkpoint-every-steps", "2", "--schedule.warmup-epochs", "0.5", "--out", str(out)]
    launch_ranks([*command, "--data.shards", str(tmp_path / "features"), *small], world_size=2, timeout_seconds=200)
    trained = load_config(out / "config.json")
    assert (trained.backbone.name, trained.backbone.feature_channels) == ("features", 12)
    assert trained.data.clips.windowing == replace(
        find_recipe("demo").data.clips.windowing, num_frames=32, frames_per_second=4.0
    )
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["videos"], summary["steps"], summary["ranks"]) == (4, 4, 2)
    model = read_model(out / "model.safetensors")
    assert not [name for name in model.weights if name.startswith("backbone.")]
    assert model.features == describe(open_any(tmp_path / "features" / "validation"))
