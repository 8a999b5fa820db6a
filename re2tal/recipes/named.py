"""Recipes that no composition of parts gives: other localizers on stored features, and a memory limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from re2tal.config import RunConfig
from re2tal.data.streaming.windows import Slide
from re2tal.localizers import VSGNConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.recipes.parts import LOCALIZER_PARTS, with_vsgn
from re2tal.recipes.presets import (
    activitynet_actionformer_features,
    activitynet_re2swin_tiny,
    demo,
    thumos14_actionformer_features,
    thumos14_re2swin_tiny,
)


def thumos14_actionformer_opentad_features() -> RunConfig:
    """ActionFormer on THUMOS-14 features as OpenTAD trains it: its numbers, and dropout on the features."""
    run = thumos14_actionformer_features()
    assert isinstance(run.localizer, ActionFormerConfig)
    localizer = replace(run.localizer, variant="opentad", candidate_min_steps=0.0, input_dropout=0.2)
    # It ignores its threshold of votes where it suppresses class by class.
    suppression = replace(run.suppression, voting_threshold=None)
    return replace(run, localizer=localizer, suppression=suppression)


def thumos14_vsgn_features() -> RunConfig:
    """VSGN as its authors released it, on THUMOS-14 features such as TSN's (RGB and flow, 2048 channels)."""
    run = thumos14_actionformer_features()
    windowing = run.data.clips.windowing
    assert isinstance(windowing, Slide)
    # Windows of 1280 steps that overlap by three quarters; half of what is seen are short clips of 0.38 of that.
    windowing = replace(windowing, num_frames=1280, overlap=0.75, short_share=0.5, short_length=0.38)
    return replace(
        run,
        num_steps=1280,
        data=replace(run.data, clips=replace(run.data.clips, windowing=windowing)),
        localizer=VSGNConfig(
            variant="original", num_neighbours=12, evaluation_weight=0.2, stitch_below=0.4, stitch_gap=30
        ),
        optimizer=replace(run.optimizer, algorithm="adam", learning_rate=5e-5, weight_decay=1e-4),
        # The source drops the rate after 15 epochs of 10: it is constant, and so it is here.
        schedule=replace(run.schedule, shape="constant", warmup_epochs=0.0),
        engine=replace(run.engine, batch_size=32, gradient_clipping=0.0),
        training=replace(run.training, epochs=10, average_decay=None),
        suppression=replace(run.suppression, sigma=0.46, max_per_video=200, voting_threshold=None),
    )


def activitynet_vsgn_features() -> RunConfig:
    """VSGN as OpenTAD builds it, on ActivityNet-1.3 features such as TSP's (512 channels), class-agnostic."""
    run = with_vsgn(activitynet_actionformer_features())
    return replace(run, engine=replace(run.engine, batch_size=32))


ACTIONFORMER_FEATURES = {"thumos14": thumos14_actionformer_features, "activitynet": activitynet_actionformer_features}


def _on_features(data: str, localizer: str) -> RunConfig:
    """Another localizer on the features and with the schedule of the ActionFormer recipe."""
    return LOCALIZER_PARTS[localizer](ACTIONFORMER_FEATURES[data]())


def on_channels(run: Callable[[], RunConfig], channels: int) -> RunConfig:
    """`run` on features of another width: 1408 channels of VideoMAE V2-g, 3200 of InternVideo2-6B."""
    base = run()
    return replace(base, backbone=replace(base.backbone, feature_channels=channels))


def within_11_gb(run: Callable[[], RunConfig]) -> RunConfig:
    """`run` on cards of 11 GB: one clip at a time, as many of them to a step, and a plan that stays within 10 GB."""
    base = run()
    engine = replace(
        base.engine,
        batch_size=1,
        gradient_accumulation=base.engine.batch_size * base.engine.gradient_accumulation,
        memory_budget_gb=10.0,
        # Cards of that size know no bf16.
        precision="fp16",
    )
    return replace(base, engine=engine)


NAMED: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "thumos14_actionformer_features": thumos14_actionformer_features,
    "activitynet_actionformer_features": activitynet_actionformer_features,
    "thumos14_re2swin_tiny_11gb": partial(within_11_gb, thumos14_re2swin_tiny),
    "activitynet_re2swin_tiny_11gb": partial(within_11_gb, activitynet_re2swin_tiny),
    "thumos14_actionformer_opentad_features": thumos14_actionformer_opentad_features,
    "thumos14_actionformer_internvideo2_features": partial(on_channels, thumos14_actionformer_features, 3200),
    "activitynet_actionformer_internvideo2_features": partial(on_channels, activitynet_actionformer_features, 3200),
    **{
        f"{data}_{localizer}_features": partial(_on_features, data, localizer)
        for localizer in ("tridet", "temporalmaxer")
        for data in ACTIONFORMER_FEATURES
    },
    "thumos14_tridet_videomae2_giant_features": partial(on_channels, partial(_on_features, "thumos14", "tridet"), 1408),
    "thumos14_vsgn_features": thumos14_vsgn_features,
    "activitynet_vsgn_features": activitynet_vsgn_features,
}
"""Name -> run; `find_recipe` gives the run its name."""
