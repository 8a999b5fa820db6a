"""RECIPES: one function per setting, which returns a whole configuration, to train as it stands or to override.

Published settings: OpenTAD's configs/re2tal (ActionFormer on Video Swin-T or SlowFast-101, reversible); on features
those of ActionFormer's release; for Kinetics mmaction2's configs/recognition/swin, with which the plain network was
trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from re2tal.backbones import BackboneConfig
from re2tal.config import DataConfig, RecognitionConfig, RunConfig
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole, Slide, Trimmed
from re2tal.evaluation.protocols import TIOU_THRESHOLDS, EvaluationConfig
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.recognizer import RecognizerConfig
from re2tal.training.config import EngineConfig, TrainingConfig
from re2tal.training.optimizer import OptimizerConfig
from re2tal.training.schedule import ScheduleConfig


def demo() -> RunConfig:
    """A rewired nano Swin and a small ActionFormer, both from random weights, on the demo videos: minutes on a CPU."""
    return RunConfig(
        name="demo",
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
        name="thumos14_re2swin_tiny",
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
        training=TrainingConfig(epochs=120, average_decay=0.999, log_every_steps=50, evaluate_every_epochs=20),
        suppression=SuppressionConfig(method="gaussian", sigma=0.7, min_score=0.001, max_per_video=2000),
        evaluation=EvaluationConfig(tiou_thresholds=TIOU_THRESHOLDS["thumos14"]),
    )


def activitynet_re2swin_tiny() -> RunConfig:
    """Re2TAL on ActivityNet-1.3: every video as 768 frames; finds actions, which a video classifier then names."""
    return RunConfig(
        name="activitynet_re2swin_tiny",
        num_steps=192,
        data=DataConfig(
            shards=Path("shards/activitynet"),
            # Actions shorter than 1 % of their video are left out of training.
            clips=ClipConfig(
                windowing=ResizeWhole(num_frames=768, shortest_action=0.01),
                size=224,
                augmentation="opentad",
                workers=4,
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
        training=TrainingConfig(epochs=15, average_decay=0.999, log_every_steps=100, evaluate_every_epochs=1),
        # The source votes at 0.9 among the proposals of a video, which are of one class.
        suppression=SuppressionConfig(
            method="gaussian", sigma=0.7, min_score=0.001, max_per_video=100, per_class=False, voting_threshold=0.9
        ),
        evaluation=EvaluationConfig(tiou_thresholds=TIOU_THRESHOLDS["activitynet"]),
    )


def thumos14_re2slowfast_r101() -> RunConfig:
    """Re2TAL on THUMOS-14 with a rewired SlowFast-101 in the place of Video Swin."""
    return replace(
        thumos14_re2swin_tiny(),
        name="thumos14_re2slowfast_r101",
        # Both pathways are resampled to the localizer's grid, 512 steps of two frames, before they are joined.
        backbone=BackboneConfig(name="slowfast_r101_8x8", norm_eval=True, frames_per_step=2, chunk_mebibytes=512),
    )


def activitynet_re2slowfast_r101() -> RunConfig:
    """Re2TAL on ActivityNet-1.3 with a rewired SlowFast-101 in the place of Video Swin."""
    return replace(
        activitynet_re2swin_tiny(),
        name="activitynet_re2slowfast_r101",
        # 192 steps of four frames.
        backbone=BackboneConfig(name="slowfast_r101_8x8", norm_eval=True, frames_per_step=4, chunk_mebibytes=512),
    )


def thumos14_actionformer_features() -> RunConfig:
    """ActionFormer on THUMOS-14 features, such as I3D's every 4 frames of 16 (RGB and flow, 2048 channels)."""
    return RunConfig(
        name="thumos14_actionformer_features",
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
        name="activitynet_actionformer_features",
        data=DataConfig(
            shards=Path("features/activitynet"),
            clips=ClipConfig(windowing=ResizeWhole(num_frames=192, shortest_action=0.0), workers=2),
        ),
        backbone=BackboneConfig(name="features", feature_channels=512, rewired=False),
        localizer=replace(
            videos.localizer,
            variant="original",
            attention_window=(7, 7, 7, 7, 7, None),
            candidate_min_steps=0.001,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.05),
        engine=EngineConfig(batch_size=16, gradient_clipping=1.0),
        training=TrainingConfig(epochs=15, average_decay=0.999, log_every_steps=100),
        suppression=replace(videos.suppression, sigma=0.75, weigh_votes_by_overlap=True),
    )


ADATAD_ADAPTER_RATES = {"small": 2e-4}
"""Peak learning rate of AdaTAD's adapters on THUMOS-14 where it is not 1e-4, by size of VideoMAE."""


def thumos14_adatad_videomae(size: str) -> RunConfig:
    """AdaTAD on THUMOS-14: adapters in a frozen VideoMAE over windows of 768 frames at 7.5 per second (102 s)."""
    swin = thumos14_re2swin_tiny()
    assert isinstance(swin.localizer, ActionFormerConfig)
    return replace(
        swin,
        name=f"thumos14_adatad_videomae_{size}",
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
        # ends there. It evaluates every second epoch from 40 on and reports the best.
        schedule=ScheduleConfig(shape="cosine", warmup_epochs=5.0, final_factor=0.377),
        # Total batch 2: two ranks of one clip. The source trains in fp16 with loss scaling.
        training=replace(swin.training, epochs=60, evaluate_every_epochs=10),
        suppression=replace(swin.suppression, min_score=0.0),
    )


def activitynet_adatad_videomae(size: str) -> RunConfig:
    """AdaTAD on ActivityNet-1.3: adapters in a frozen VideoMAE, every video as 768 frames; finds actions, which a video
    classifier then names."""
    swin, thumos = activitynet_re2swin_tiny(), thumos14_adatad_videomae(size)
    return replace(
        swin,
        name=f"activitynet_adatad_videomae_{size}",
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
        name="thumos14_adatad_videomae_giant_224",
        data=replace(giant.data, clips=replace(giant.data.clips, windowing=windowing, size=224)),
        backbone=replace(giant.backbone, adapter_blocks=tuple(range(20, 40))),
        # Stopped at 50 of 100 epochs, at 0.541 of the peak.
        schedule=replace(giant.schedule, final_factor=0.541),
        training=replace(giant.training, epochs=50),
    )


def activitynet_adatad_videomae_giant_224() -> RunConfig:
    """AdaTAD's best on ActivityNet-1.3: VideoMAE V2-g on 768 frames of 224 pixels, adapters in its upper half."""
    giant = activitynet_adatad_videomae("giant")
    return replace(
        giant,
        name="activitynet_adatad_videomae_giant_224",
        data=replace(giant.data, clips=replace(giant.data.clips, size=224)),
        backbone=replace(giant.backbone, adapter_blocks=tuple(range(20, 40))),
        # Total batch 16: eight ranks of two videos.
        engine=replace(giant.engine, batch_size=2),
    )


def demo_clips() -> RecognitionConfig:
    """The demo's backbone from random weights on trimmed clips of the same motions: 20 minutes on two busy cores.
    It learns along which axis things move, and hardly in which sense (docs/experiments.md)."""
    detector, one_second = demo(), Trimmed(num_frames=8, frames_per_second=8.0, num_views=4)
    return RecognitionConfig(
        name="demo_clips",
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
        name=f"kinetics400_re2swin_tiny_{epochs}",
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
        name=f"kinetics400_re2slowfast_r101_{epochs}",
        # Every second frame of about 30 a second, and 10 views x 3 crops, as mmaction2 tests the plain network.
        data=replace(swin.data, clips=replace(swin.data.clips, windowing=windowing)),
        # Batch norms learn, their statistics over the eight clips of a rank: they need whole branches.
        backbone=BackboneConfig(name="slowfast_r101_8x8"),
    )


RECIPES: dict[str, Callable[[], RunConfig] | Callable[[], RecognitionConfig]] = {
    "demo": demo,
    "demo_clips": demo_clips,
    "thumos14_re2swin_tiny": thumos14_re2swin_tiny,
    "activitynet_re2swin_tiny": activitynet_re2swin_tiny,
    "thumos14_re2slowfast_r101": thumos14_re2slowfast_r101,
    "activitynet_re2slowfast_r101": activitynet_re2slowfast_r101,
    "thumos14_actionformer_features": thumos14_actionformer_features,
    "activitynet_actionformer_features": activitynet_actionformer_features,
    "kinetics400_re2swin_tiny_30": partial(kinetics400_re2swin_tiny, 30),
    "kinetics400_re2swin_tiny_10": partial(kinetics400_re2swin_tiny, 10),
    "kinetics400_re2slowfast_r101_30": partial(kinetics400_re2slowfast_r101, 30),
    "kinetics400_re2slowfast_r101_10": partial(kinetics400_re2slowfast_r101, 10),
    **{
        f"{data}_adatad_videomae_{size}": partial(recipe, size)
        for data, recipe in (("thumos14", thumos14_adatad_videomae), ("activitynet", activitynet_adatad_videomae))
        for size in ("small", "base", "large", "huge", "giant")
    },
    "thumos14_adatad_videomae_giant_224": thumos14_adatad_videomae_giant_224,
    "activitynet_adatad_videomae_giant_224": activitynet_adatad_videomae_giant_224,
}
