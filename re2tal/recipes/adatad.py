"""AdaTAD as OpenTAD's configs/adatad have it: adapters in a frozen VideoMAE, on the windows of its two data sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from re2tal.backbones import BackboneConfig
from re2tal.config import RunConfig
from re2tal.data.streaming.windows import Slide
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.recipes.presets import activitynet_re2swin_tiny, thumos14_re2swin_tiny
from re2tal.training.optimizer import OptimizerConfig
from re2tal.training.schedule import ScheduleConfig

ADATAD_ADAPTER_RATES = {"small": 2e-4}
"""Peak learning rate of AdaTAD's adapters on THUMOS-14 where it is not 1e-4, by size of VideoMAE."""


def thumos14_adatad_videomae(size: str) -> RunConfig:
    """AdaTAD on THUMOS-14: adapters in a frozen VideoMAE over windows of 768 frames at 7.5 per second (102 s)."""
    swin = thumos14_re2swin_tiny()
    assert isinstance(swin.localizer, ActionFormerConfig)
    return replace(
        swin,
        num_steps=768,
        # Every fourth of 30 frames a second. The source's giant sees 160 pixels, of which patches of 14 leave 6 out;
        # here the whole picture has 154: as many patches.
        data=replace(
            swin.data,
            clips=replace(
                swin.data.clips,
                windowing=Slide(num_frames=768, frames_per_second=7.5),
                size=154 if size == "giant" else 160,
            ),
        ),
        # With beta 0 it is the plain network of the source, frozen but for its adapters; of every block its input is
        # kept, as the source's checkpoints do.
        backbone=BackboneConfig(name=f"videomae_{size}", adapter="temporal", unit="block", beta=0.0, drop_path=0.1),
        localizer=replace(swin.localizer, max_num_steps=768),
        # The source decays all of the adapters; here their biases and scales are left out.
        optimizer=OptimizerConfig(
            learning_rate=1e-4, backbone_learning_rate=ADATAD_ADAPTER_RATES.get(size, 1e-4), weight_decay=0.05
        ),
        # The source's cosine is laid out for 100 epochs and stopped at 60, at 0.377 of the peak: here a half cosine
        # ends there.
        schedule=ScheduleConfig(shape="cosine", warmup_epochs=5.0, final_factor=0.377),
        # Total batch 2: two ranks of one clip. The source trains in fp16 with loss scaling.
        training=replace(swin.training, epochs=60, evaluate_every_epochs=2, evaluate_from_epoch=40),
        suppression=replace(swin.suppression, min_score=0.0),
    )


def activitynet_adatad_videomae(size: str) -> RunConfig:
    """AdaTAD on ActivityNet-1.3: adapters in a frozen VideoMAE, every video as 768 frames; finds actions, which a video
    classifier then names."""
    swin, thumos = activitynet_re2swin_tiny(), thumos14_adatad_videomae(size)
    return replace(
        swin,
        data=replace(swin.data, clips=replace(swin.data.clips, size=thumos.data.clips.size)),
        backbone=thumos.backbone,
        optimizer=OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=1e-4, weight_decay=0.05),
        # Total batch 16: four ranks of four videos.
        engine=replace(swin.engine, batch_size=4),
    )


def thumos14_adatad_videomae_giant_224() -> RunConfig:
    """AdaTAD's best on THUMOS-14: VideoMAE V2-g on 1536 frames of 224 pixels at 15 per second, adapters in its upper
    half."""
    giant = thumos14_adatad_videomae("giant")
    windowing = Slide(num_frames=1536, frames_per_second=15.0)
    return replace(
        giant,
        data=replace(giant.data, clips=replace(giant.data.clips, windowing=windowing, size=224)),
        backbone=replace(giant.backbone, adapter_blocks=tuple(range(20, 40))),
        # Stopped at 50 of 100 epochs, at 0.541 of the peak.
        schedule=replace(giant.schedule, final_factor=0.541),
        training=replace(giant.training, epochs=50, evaluate_from_epoch=38),
    )


def activitynet_adatad_videomae_giant_224() -> RunConfig:
    """AdaTAD's best on ActivityNet-1.3: VideoMAE V2-g on 768 frames of 224 pixels, adapters in its upper half."""
    giant = activitynet_adatad_videomae("giant")
    return replace(
        giant,
        data=replace(giant.data, clips=replace(giant.data.clips, size=224)),
        backbone=replace(giant.backbone, adapter_blocks=tuple(range(20, 40))),
        # Total batch 16: eight ranks of two videos.
        engine=replace(giant.engine, batch_size=2),
    )


ADATAD: dict[str, Callable[[], RunConfig]] = {
    **{
        f"{data}_adatad_videomae_{size}": partial(recipe, size)
        for data, recipe in (("thumos14", thumos14_adatad_videomae), ("activitynet", activitynet_adatad_videomae))
        for size in ("small", "base", "large", "huge", "giant")
    },
    "thumos14_adatad_videomae_giant_224": thumos14_adatad_videomae_giant_224,
    "activitynet_adatad_videomae_giant_224": activitynet_adatad_videomae_giant_224,
}
