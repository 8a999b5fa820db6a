"""Recipes at tiny size, trained for three steps on shards and features in the real layouts, then evaluated.

A recipe keeps its kind of windows, network, localizer, optimizer, suppression and thresholds; only sizes shrink. The
engine is left out: tests of `re2tal train` have it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.feature_folders import write_features
from data.folders import indexed, write_shards
from data.numbered import encode_numbered

from re2tal.backbones import BackboneConfig
from re2tal.config import RunConfig, build_detector
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.data.streaming.stream import stream_clips
from re2tal.data.streaming.windows import Slide
from re2tal.evaluation.average_precision import mean_average_precision
from re2tal.evaluation.matching import match_predictions
from re2tal.inference import detector_input, predict
from re2tal.recipes import RECIPES, find_recipe
from re2tal.recipes.parts import DATA_PARTS, LOCALIZER_PARTS
from re2tal.structures import Action, FeatureBatch
from re2tal.training.frames import prepare_frames
from re2tal.training.optimizer import build_optimizer

ACTIONS = [Action(0.2, 0.8, "jump"), Action(1.0, 1.6, "run")]
CLASSES = ("jump", "run")
CHOSEN = (
    "thumos14_re2swin_tiny",
    "thumos14_swin_tiny_vsgn",
    "thumos14_vsgn_features",
    "thumos14_tridet_features",
    "activitynet_slowfast_r101",
    "activitynet_adatad_videomae_large",
    "activitynet_re2slowfast_r101_vsgn",
    "activitynet_vsgn_features",
    "activitynet_actionformer_features",
    "hacs_re2swin_tiny_temporalmaxer",
    "hacs_re2videomae_base_vsgn_features",
    "multithumos_re2videomae_base",
    "multithumos_re2swin_tiny_tridet_features",
    "fineaction_re2swin_tiny_vsgn",
    "fineaction_swin_tiny_temporalmaxer_features",
    "epic_kitchens_verb_re2swin_tiny_tridet",
    "epic_kitchens_noun_re2slowfast_r101_features",
    "ego4d_mq_re2vjepa2_large",
    "ego4d_mq_re2swin_tiny_vsgn_features",
    "charades_re2slowfast_r101_temporalmaxer",
    "charades_re2swin_tiny_features",
)
EPIC = {"epic_kitchens_verb", "epic_kitchens_noun"}
LOCALIZATION = [name for name in RECIPES if isinstance(find_recipe(name), RunConfig)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = tmp_path_factory.mktemp("videos")
    given = {name: (encode_numbered(64), indexed(64, actions=ACTIONS)) for name in ("a", "b")}
    return write_shards(root / "training", given, per_shard=1, classes=CLASSES)


def test_the_chosen_ones_cover_every_data_set_both_inputs_and_every_localizer() -> None:
    runs = [(name, find_recipe(name)) for name in CHOSEN]
    for features in (False, True):
        these = [(name, run) for name, run in runs if (run.backbone.name == "features") is features]
        assert {data for data in DATA_PARTS for name, _ in these if name.startswith(data)} >= {*DATA_PARTS} - EPIC
        assert any(name.startswith("epic_kitchens") for name, _ in these)
        localizers = {run.localizer.name for _, run in these if isinstance(run, RunConfig)}
        assert localizers == set(LOCALIZER_PARTS)


@pytest.mark.parametrize("name", CHOSEN)
def test_a_recipe_trains_and_finds(name: str, videos: ShardSet, tmp_path: Path) -> None:
    check(name, videos, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*LOCALIZATION} - {*CHOSEN}))
def test_every_other_recipe_does_too(name: str, videos: ShardSet, tmp_path: Path) -> None:
    check(name, videos, tmp_path)


def check(name: str, videos: ShardSet, folder: Path) -> None:
    run = tiny(find_recipe(name))
    shards = videos if run.backbone.name != "features" else features_for(run, folder)
    torch.manual_seed(0)
    detector = build_detector(run, shards.classes).train()
    optimizer = build_optimizer(detector, replace(run.optimizer, learning_rate=1e-3))
    clips = stream_clips(shards, run.data.clips, batch_size=2, training=True)
    before = {key: value.clone() for key, value in detector.named_parameters() if value.requires_grad}
    for epoch in range(3):
        (batch,) = clips.epoch(epoch)
        assert any(batch.actions), "no clip shows an action"
        outputs = detector(prepared(batch, run), batch.mask)
        losses = detector.loss(outputs, batch.actions, batch.timelines, num_frames=batch.mask.shape[1])
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        optimizer.zero_grad()
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), run.engine.gradient_clipping or 1e9)
        optimizer.step()
    after = dict(detector.named_parameters())
    changed = {key.partition(".")[0] for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == ({"localizer"} if run.backbone.name == "features" else {"backbone", "localizer"})

    looked = stream_clips(shards, run.data.clips, batch_size=2, training=False)
    found = predict(detector, looked.epoch(0), suppression=run.suppression, device="cpu")
    assert sorted(found) == ["a", "b"]
    assert all(torch.isfinite(one.scores).all() for one in found.values())
    if not getattr(run.localizer, "class_agnostic", False):
        report = mean_average_precision(
            match_predictions(
                found,
                [video.record for video in shards.videos],
                classes=detector.classes,
                protocol=run.evaluation.protocol,
                tiou_thresholds=run.evaluation.tiou_thresholds,
            )
        )
        assert 0 <= report.average_map <= 1


def prepared(batch: Any, run: RunConfig) -> torch.Tensor:
    if isinstance(batch, FeatureBatch):
        return detector_input(batch, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    return prepare_frames(batch.frames, strength=run.data.clips.colour_jitter, generator=generator, dtype=torch.float32)


def features_for(run: RunConfig, folder: Path) -> FeatureSet:
    """Of two videos, at the rate that the recipe's windows have."""
    windowing = run.data.clips.windowing
    rate = windowing.frames_per_second if isinstance(windowing, Slide) and windowing.frames_per_second else 15.0
    generator = np.random.default_rng(0)
    channels = run.backbone.feature_channels
    assert channels is not None
    values = {name: torch.from_numpy(generator.normal(size=(channels, 40)).astype(np.float32)) for name in ("a", "b")}
    return write_features(
        folder / "training", values, actions=ACTIONS, seconds_per_step=1 / rate, per_shard=1, classes=CLASSES
    )


def tiny(run: Any) -> RunConfig:
    """`run` with small numbers in the place of large ones, and nothing else changed."""
    windowing, on_features = run.data.clips.windowing, run.backbone.name == "features"
    num_steps = 16
    windowing = replace(windowing, num_frames=num_steps if on_features else 32)
    if isinstance(windowing, Slide):
        windowing = replace(windowing, short_length=0.25)
    clips = replace(run.data.clips, windowing=windowing, size=32, workers=0)
    return replace(
        run,
        num_steps=num_steps,
        data=replace(run.data, clips=clips),
        backbone=tiny_backbone(run.backbone),
        localizer=tiny_localizer(run.localizer, num_steps),
        engine=replace(run.engine, precision="fp32"),
    )


def tiny_backbone(backbone: BackboneConfig) -> BackboneConfig:
    if backbone.name == "features":
        return replace(backbone, feature_channels=8)
    family = backbone.name.partition("_")[0]
    return replace(
        backbone,
        name=f"{family}_nano",
        adapter_blocks=(1,) if backbone.adapter_blocks else None,
    )


def tiny_localizer(localizer: Any, num_steps: int) -> Any:
    small = {
        "channels": 16,
        "num_heads": 2,
        "num_groups": 4,
        "num_levels": 3,
        "max_num_steps": num_steps,
        "mlp_channels": 16,
        "num_head_convs": 1,
        "stitch_gap": 2,
        "regression_ranges": ((0, 4), (4, 8), (8, 10_000)),
        "attention_window": None,
    }
    known = {field.name for field in fields(localizer)}
    small = {key: value for key, value in small.items() if key in known}
    if localizer.name == "vsgn" and localizer.num_neighbours:
        small["num_neighbours"] = 4
    return replace(localizer, **small)
