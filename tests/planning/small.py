"""A run small enough for a dry run in seconds."""

from __future__ import annotations

from dataclasses import replace

from re2tal.backbones import BackboneConfig
from re2tal.config import RunConfig
from re2tal.data.streaming.windows import Slide
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.recipes.presets import demo


def small_run(**engine) -> RunConfig:
    """A rewired nano Swin on two clips of 16 frames of 48 x 48."""
    run = demo()
    clips = replace(run.data.clips, windowing=Slide(num_frames=16, frames_per_second=8.0), size=48)
    return replace(
        run,
        num_steps=8,
        data=replace(run.data, clips=clips),
        backbone=BackboneConfig(name="swin3d_nano"),
        localizer=ActionFormerConfig(
            channels=16,
            num_embedding_convs=1,
            num_stem_blocks=1,
            max_num_steps=8,
            regression_ranges=((0, 4), (4, 10_000)),
        ),
        engine=replace(run.engine, batch_size=2, **engine),
    )
