"""Recognizers: a backbone learns from trimmed clips before a detector starts from it.

Published settings: mmaction2's configs/recognition/swin, with which the plain network was trained on Kinetics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from re2tal.backbones import BackboneConfig
from re2tal.config import DataConfig, RecognitionConfig
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import Trimmed
from re2tal.recipes.presets import demo
from re2tal.recognizer import RecognizerConfig
from re2tal.training.config import EngineConfig, TrainingConfig
from re2tal.training.optimizer import OptimizerConfig
from re2tal.training.schedule import ScheduleConfig


def demo_clips() -> RecognitionConfig:
    """The demo's backbone from random weights on trimmed clips of the same motions: 20 minutes on two busy cores.
    It learns along which axis things move, and hardly in which sense (docs/experiments.md)."""
    detector, one_second = demo(), Trimmed(num_frames=8, frames_per_second=8.0, num_views=4)
    return RecognitionConfig(
        data=DataConfig(shards=Path("demo_clips/shards"), clips=replace(detector.data.clips, windowing=one_second)),
        backbone=detector.backbone,
        recognizer=RecognizerConfig(dropout=0.0),
        optimizer=detector.optimizer,
        schedule=ScheduleConfig(warmup_epochs=1.0),
        # Total batch 32: two ranks of 16 clips.
        engine=EngineConfig(batch_size=16),
        training=replace(detector.training, epochs=40),
    )


def kinetics400_re2swin_tiny(epochs: int) -> RecognitionConfig:
    """From plain Kinetics weights to a rewired Video Swin-T: 30 epochs more, as OpenTAD's were named ("ft_e30"), or
    10."""
    return RecognitionConfig(
        data=DataConfig(
            shards=Path("shards/kinetics400"),
            # The source takes every second frame of about 30 a second. 4 views x 3 crops are what it reports.
            clips=ClipConfig(windowing=Trimmed(num_frames=32, frames_per_second=15.0, num_crops=3), workers=8),
        ),
        backbone=BackboneConfig(name="swin3d_tiny", drop_path=0.1, chunk_mebibytes=128),
        recognizer=RecognizerConfig(dropout=0.5),
        optimizer=OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=1e-4, weight_decay=0.02),
        schedule=ScheduleConfig(shape="cosine", warmup_epochs=2.5 if epochs == 30 else 1.0),
        # Total batch 64: eight ranks of eight clips. The source clips no gradients, and trains in fp16.
        engine=EngineConfig(batch_size=8, gradient_clipping=0.0, precision="bf16"),
        training=TrainingConfig(epochs=epochs, average_decay=None, log_every_steps=100, evaluate_every_epochs=5),
    )


def kinetics400_re2slowfast_r101(epochs: int) -> RecognitionConfig:
    """From plain Kinetics weights to a rewired SlowFast-101 8x8, 30 or 10 epochs more. OpenTAD's settings for it are
    not published, so optimizer and schedule are those of Video Swin."""
    swin = kinetics400_re2swin_tiny(epochs)
    windowing = Trimmed(num_frames=32, frames_per_second=15.0, num_views=10, num_crops=3)
    return replace(
        swin,
        # Every second frame of about 30 a second, and 10 views x 3 crops, as mmaction2 tests the plain network.
        data=replace(swin.data, clips=replace(swin.data.clips, windowing=windowing)),
        # Batch norms learn, their statistics over the eight clips of a rank: they need whole branches.
        backbone=BackboneConfig(name="slowfast_r101_8x8"),
    )


RECOGNITION: dict[str, Callable[[], RecognitionConfig]] = {
    "demo_clips": demo_clips,
    **{
        f"kinetics400_{name}_{epochs}": partial(recipe, epochs)
        for name, recipe in (
            ("re2swin_tiny", kinetics400_re2swin_tiny),
            ("re2slowfast_r101", kinetics400_re2slowfast_r101),
        )
        for epochs in (30, 10)
    },
}
