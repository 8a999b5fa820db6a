"""The demo, and the detectors that others derive from: a function per setting returns a whole configuration.

Published settings: OpenTAD's configs/re2tal (ActionFormer on Video Swin-T, reversible); on features those of
ActionFormer's release.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from re2tal.backbones import BackboneConfig
from re2tal.config import DataConfig, RunConfig
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.evaluation.protocols import TIOU_THRESHOLDS, EvaluationConfig
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.training.config import EngineConfig, TrainingConfig
from re2tal.training.optimizer import OptimizerConfig
from re2tal.training.schedule import ScheduleConfig


def demo() -> RunConfig:
    """A rewired nano Swin and a small ActionFormer, both from random weights, on the demo videos: minutes on a CPU."""
    return RunConfig(
        # Windows of 8 seconds; the backbone gives four steps a second.
        num_steps=32,
        data=DataConfig(
            shards=Path("demo_data/shards"),
            clips=ClipConfig(
                windowing=Slide(num_frames=64, frames_per_second=8.0),
                size=48,
                fit="stretch",
                crop_area=(1.0, 1.0),
                # The classes are directions and kinds of motion: a mirror makes one into another.
                flip=False,
                workers=1,
            ),
        ),
        backbone=BackboneConfig(name="swin3d_nano"),
        localizer=ActionFormerConfig(
            channels=64,
            num_embedding_convs=1,
            num_stem_blocks=1,
            max_num_steps=32,
            regression_ranges=((0, 4), (4, 8), (8, 16), (16, 10_000)),
            initial_positives=40,
            # The backbone is not pretrained: without this it does not find out in time what moves.
            step_supervision=1.7,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, backbone_learning_rate=2e-3),
        schedule=ScheduleConfig(warmup_epochs=4.0),
        engine=EngineConfig(batch_size=4),
        training=TrainingConfig(epochs=32, average_decay=0.98, log_every_steps=10, checkpoint_every_steps=100),
        suppression=SuppressionConfig(sigma=0.5, max_per_video=100),
        evaluation=EvaluationConfig(tiou_thresholds=TIOU_THRESHOLDS["demo"]),
    )


def thumos14_re2swin_tiny() -> RunConfig:
    """Re2TAL on THUMOS-14: windows of 1024 frames at 15 per second (68 s), two clips per optimizer step."""
    return RunConfig(
        # One cell of the head's grid is two sampled frames; a window is 512 cells.
        num_steps=512,
        data=DataConfig(
            shards=Path("shards/thumos14"),
            # Every second of the source's 30 frames a second. An action belongs to a training window that shows three
            # quarters of it; test windows overlap by half, the last one ends with the video.
            clips=ClipConfig(
                windowing=Slide(num_frames=1024, frames_per_second=15.0), size=224, augmentation="opentad", workers=2
            ),
        ),
        # 0.2 where the plain network has 0.1; every norm in evaluation mode with its scale and shift frozen. Pieces
        # (docs/results.md): smaller ones need as much, what is left are frames, states and the localizer.
        backbone=BackboneConfig(name="swin3d_tiny", drop_path=0.2, norm_eval=True, chunk_mebibytes=512),
        localizer=ActionFormerConfig(),
        # The source decays the whole backbone; here its biases, norms and position tables are left out.
        optimizer=OptimizerConfig(learning_rate=1e-4, backbone_learning_rate=1e-5, weight_decay=0.05),
        # The source's cosine is laid out for 1500 epochs and stopped at 120, with 98.5 % of the peak left: constant.
        schedule=ScheduleConfig(shape="constant", warmup_epochs=5.0),
        # Total batch 2: two ranks of one clip. The source trains in fp16 with loss scaling.
        engine=EngineConfig(batch_size=1, gradient_clipping=1.0, precision="bf16"),
        training=TrainingConfig(
            epochs=120,
            average_decay=0.999,
            log_every_steps=50,
            evaluate_every_epochs=5,
            evaluate_from_epoch=80,
            keep_best=True,
        ),
        suppression=SuppressionConfig(method="gaussian", sigma=0.7, min_score=0.001, max_per_video=2000),
        evaluation=EvaluationConfig(tiou_thresholds=TIOU_THRESHOLDS["thumos14"]),
    )


def activitynet_re2swin_tiny() -> RunConfig:
    """Re2TAL on ActivityNet-1.3: every video as 768 frames; finds actions, which a video classifier then names."""
    return RunConfig(
        num_steps=192,
        data=DataConfig(
            shards=Path("shards/activitynet"),
            # Actions shorter than 1 % of their video are left out of training.
            clips=ClipConfig(
                windowing=ResizeWhole(num_frames=768, shortest_action=0.01), size=224, augmentation="opentad", workers=4
            ),
        ),
        backbone=BackboneConfig(name="swin3d_tiny", drop_path=0.2, norm_eval=True, chunk_mebibytes=512),
        localizer=ActionFormerConfig(
            channels=256,
            position_encoding=True,
            max_num_steps=192,
            label_smoothing=0.1,
            regression_weight=2.0,
            initial_positives=200,
            class_agnostic=True,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=1e-5, weight_decay=0.05),
        schedule=ScheduleConfig(shape="cosine", warmup_epochs=5.0),
        # Total batch 8: four ranks of two clips.
        engine=EngineConfig(batch_size=2, gradient_clipping=1.0, precision="bf16"),
        training=TrainingConfig(
            epochs=15,
            average_decay=0.999,
            log_every_steps=100,
            evaluate_every_epochs=1,
            evaluate_from_epoch=8,
            keep_best=True,
        ),
        # The source votes at 0.9 among the proposals of a video, which are of one class.
        suppression=SuppressionConfig(
            method="gaussian", sigma=0.7, min_score=0.001, max_per_video=100, per_class=False, voting_threshold=0.9
        ),
        evaluation=EvaluationConfig(tiou_thresholds=TIOU_THRESHOLDS["activitynet"]),
    )


def thumos14_actionformer_features() -> RunConfig:
    """ActionFormer on THUMOS-14 features, such as I3D's every 4 frames of 16 (RGB and flow, 2048 channels)."""
    return RunConfig(
        num_steps=2304,
        data=DataConfig(
            shards=Path("features/thumos14"),
            # The source looks at whole test videos; here those of more than 2304 steps (five minutes) are cut into
            # windows that overlap by half.
            clips=ClipConfig(windowing=Slide(num_frames=2304, frames_per_second=None, kept_share=0.5), workers=2),
        ),
        backbone=BackboneConfig(name="features", feature_channels=2048, rewired=False),
        localizer=ActionFormerConfig(
            variant="original", attention_window=19, max_num_steps=2304, candidate_min_steps=0.05
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.05),
        schedule=ScheduleConfig(shape="cosine", warmup_epochs=5.0),
        engine=EngineConfig(batch_size=2, gradient_clipping=1.0),
        training=TrainingConfig(epochs=35, average_decay=0.999, log_every_steps=50),
        suppression=SuppressionConfig(
            method="gaussian",
            sigma=0.5,
            min_score=0.001,
            max_per_video=200,
            voting_threshold=0.7,
            weigh_votes_by_overlap=True,
        ),
        evaluation=EvaluationConfig(tiou_thresholds=TIOU_THRESHOLDS["thumos14"]),
    )


def activitynet_actionformer_features() -> RunConfig:
    """ActionFormer on ActivityNet-1.3 features, such as TSP's every 16 frames of 16 (512 channels), resized to 192."""
    videos = activitynet_re2swin_tiny()
    assert isinstance(videos.localizer, ActionFormerConfig)
    return replace(
        videos,
        data=DataConfig(
            shards=Path("features/activitynet"),
            clips=ClipConfig(windowing=ResizeWhole(num_frames=192, shortest_action=0.0), workers=2),
        ),
        backbone=BackboneConfig(name="features", feature_channels=512, rewired=False),
        localizer=replace(
            videos.localizer, variant="original", attention_window=(7, 7, 7, 7, 7, None), candidate_min_steps=0.001
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.05),
        engine=EngineConfig(batch_size=16, gradient_clipping=1.0),
        training=TrainingConfig(epochs=15, average_decay=0.999, log_every_steps=100),
        suppression=replace(videos.suppression, sigma=0.75, weigh_votes_by_overlap=True),
    )
