"""Recipes put together from three tables: a data set, a backbone, a localizer, on videos or on stored features.

    thumos14 + re2swin_tiny + vsgn + features  ->  thumos14_re2swin_tiny_vsgn_features

Each data set is a whole run (rewired Video Swin-T, ActionFormer), in which backbone and localizer are replaced. "re2"
before a backbone's name says rewired; without, it is the plain network, of which the input of every block is kept, as
where a source checkpoints every block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from re2tal.backbones import BackboneConfig
from re2tal.config import DataConfig, RunConfig
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.evaluation.protocols import TIOU_THRESHOLDS, Dataset, EvaluationConfig
from re2tal.localizers import TemporalMaxerConfig, TriDetConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.localizers.vsgn.config import VSGNConfig
from re2tal.recipes.adatad import thumos14_adatad_videomae
from re2tal.recipes.presets import activitynet_re2swin_tiny, thumos14_re2swin_tiny
from re2tal.training.annealing import AnnealingConfig


@dataclass(frozen=True, slots=True)
class BackbonePart:
    """A backbone as recipes take it."""

    channels: int
    """Of its features."""
    build: Callable[[RunConfig], RunConfig]
    """A run on a data set with another backbone -> with this one."""


def _slowfast(run: RunConfig) -> RunConfig:
    # Both pathways are resampled to the localizer's grid before they are joined. Steps divide the slow pathway's four
    # frames; a grid between is reached from the next finer one.
    step = run.data.clips.windowing.num_frames // run.num_steps
    return replace(
        run,
        backbone=BackboneConfig(
            name="slowfast_r101_8x8",
            norm_eval=True,
            frames_per_step=max(n for n in (1, 2, 4) if n <= step),
            chunk_mebibytes=512,
        ),
    )


def _plain(run: RunConfig, *, of: BackbonePart, drop_path: float) -> RunConfig:
    run = of.build(run)
    # With beta 0 it is the plain network.
    backbone = replace(run.backbone, drop_path=drop_path, unit="block", beta=0.0, chunk_mebibytes=None)
    return replace(run, backbone=backbone)


def _transformer(run: RunConfig, *, name: str, size: int) -> RunConfig:
    """All of a large transformer trained; THUMOS14's windows become AdaTAD's, of 768 frames at half the rate."""
    windowing, num_steps = run.data.clips.windowing, run.num_steps
    # Windows of other data sets are laid out for the length of their actions, and stay.
    if windowing == thumos14_re2swin_tiny().data.clips.windowing:
        source = thumos14_adatad_videomae("base")
        windowing, num_steps = source.data.clips.windowing, source.num_steps
    assert isinstance(run.localizer, ActionFormerConfig)
    return replace(
        run,
        num_steps=num_steps,
        data=replace(run.data, clips=replace(run.data.clips, windowing=windowing, size=size)),
        # Weights are those of the plain network: beta goes from 0 to 1, so that training starts from its function.
        backbone=BackboneConfig(name=name, drop_path=0.1, chunk_mebibytes=512),
        annealing=AnnealingConfig(epochs=5.0),
        localizer=replace(run.localizer, max_num_steps=num_steps),
    )


_RE2SWIN = BackbonePart(768, lambda run: run)
_RE2SLOWFAST = BackbonePart(2304, _slowfast)
BACKBONE_PARTS: dict[str, BackbonePart] = {
    "re2swin_tiny": _RE2SWIN,
    "swin_tiny": BackbonePart(768, partial(_plain, of=_RE2SWIN, drop_path=0.1)),
    "re2slowfast_r101": _RE2SLOWFAST,
    "slowfast_r101": BackbonePart(2304, partial(_plain, of=_RE2SLOWFAST, drop_path=0.0)),
    **{
        f"re2videomae_{size}": BackbonePart(width, partial(_transformer, name=f"videomae_{size}", size=160))
        for size, width in (("base", 768), ("large", 1024), ("huge", 1280))
    },
    "re2videomae_giant": BackbonePart(1408, partial(_transformer, name="videomae_giant", size=224)),
    "re2vjepa2_large": BackbonePart(1024, partial(_transformer, name="vjepa2_large", size=256)),
    "re2vjepa2_giant": BackbonePart(1408, partial(_transformer, name="vjepa2_giant", size=256)),
    "re2internvideo2_1b": BackbonePart(1408, partial(_transformer, name="internvideo2_1b", size=224)),
}


def _thumos_like(shards: str, thresholds: Dataset, *, initial_positives: int = 100) -> RunConfig:
    run = thumos14_re2swin_tiny()
    assert isinstance(run.localizer, ActionFormerConfig)
    return replace(
        run,
        data=replace(run.data, shards=Path("shards") / shards),
        localizer=replace(run.localizer, initial_positives=initial_positives),
        evaluation=EvaluationConfig(tiou_thresholds=TIOU_THRESHOLDS[thresholds]),
    )


def _with_windows(run: RunConfig, num_frames: int, frames_per_second: float) -> RunConfig:
    windowing = Slide(num_frames=num_frames, frames_per_second=frames_per_second)
    assert isinstance(run.localizer, ActionFormerConfig)
    return replace(
        run,
        num_steps=num_frames // 2,
        data=replace(run.data, clips=replace(run.data.clips, windowing=windowing)),
        localizer=replace(run.localizer, max_num_steps=num_frames // 2),
    )


def hacs() -> RunConfig:
    """HACS Segments as ActivityNet: whole videos, actions without their class."""
    run = activitynet_re2swin_tiny()
    evaluation = EvaluationConfig(tiou_thresholds=TIOU_THRESHOLDS["hacs"])
    return replace(run, data=replace(run.data, shards=Path("shards/hacs")), evaluation=evaluation)


def charades() -> RunConfig:
    """Charades: a window of 34 s holds nearly every video."""
    return _with_windows(_thumos_like("charades", "charades"), 512, 15.0)


def epic_kitchens(task: str) -> RunConfig:
    """EPIC-Kitchens-100, verbs or nouns: windows of 137 s; many actions at once."""
    return _with_windows(_thumos_like(f"epic-kitchens-{task}", "epic-kitchens", initial_positives=250), 1024, 7.5)


def ego4d_mq() -> RunConfig:
    """Ego4D moment queries: a window of 512 s holds a whole clip of eight minutes."""
    return _with_windows(_thumos_like("ego4d-mq", "ego4d-mq"), 1024, 2.0)


DATA_PARTS: dict[str, Callable[[], RunConfig]] = {
    "thumos14": thumos14_re2swin_tiny,
    "activitynet": activitynet_re2swin_tiny,
    "hacs": hacs,
    "multithumos": partial(_thumos_like, "multithumos", "multithumos"),
    # Many actions are shorter than 2 s, and a video has several classes: windows, not whole videos.
    "fineaction": partial(_thumos_like, "fineaction", "fineaction"),
    "epic_kitchens_verb": partial(epic_kitchens, "verb"),
    "epic_kitchens_noun": partial(epic_kitchens, "noun"),
    "ego4d_mq": ego4d_mq,
    "charades": charades,
}
"""Name -> the run with rewired Video Swin-T and ActionFormer."""


def with_vsgn(run: RunConfig) -> RunConfig:
    """`run` with VSGN. On sliding windows half of what it sees are short clips, stitched to magnified copies."""
    windowing = run.data.clips.windowing
    if isinstance(windowing, ResizeWhole):
        # A whole video fills the grid, so nothing is stitched. 256 steps hold whole strides of all levels.
        windowing = replace(windowing, num_frames=max(windowing.num_frames, 256))
        localizer = VSGNConfig(first_stride=2, anchor_scales=(3.0, 7.5), class_agnostic=True)
        optimizer = replace(run.optimizer, learning_rate=1e-4)
        suppression = replace(run.suppression, sigma=0.5, voting_threshold=None)
        return replace(
            run,
            num_steps=256,
            data=replace(run.data, clips=replace(run.data.clips, windowing=windowing)),
            localizer=localizer,
            optimizer=optimizer,
            suppression=suppression,
        )
    assert isinstance(windowing, Slide)
    return replace(
        run,
        # The source's gap is 30 of 1280 steps.
        localizer=VSGNConfig(num_neighbours=12, stitch_below=0.4, stitch_gap=round(30 / 1280 * run.num_steps)),
        data=replace(run.data, clips=replace(run.data.clips, windowing=replace(windowing, short_share=0.5))),
        optimizer=replace(run.optimizer, algorithm="adam", learning_rate=5e-5, weight_decay=1e-4),
        suppression=replace(run.suppression, sigma=0.4, max_per_video=200),
    )


def with_pyramid(run: RunConfig, kind: type[TriDetConfig] | type[TemporalMaxerConfig]) -> RunConfig:
    """`run` with that localizer, as OpenTAD builds it, in the place of ActionFormer: its width, classes and losses."""
    source = run.localizer
    assert isinstance(source, ActionFormerConfig)
    names = ("channels", "label_smoothing", "regression_weight", "initial_positives", "class_agnostic")
    localizer = kind(**{name: getattr(source, name) for name in names})
    if isinstance(localizer, TriDetConfig):
        localizer = replace(localizer, max_num_steps=run.num_steps)
    return replace(run, localizer=localizer)


LOCALIZER_PARTS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "actionformer": lambda run: run,
    "vsgn": with_vsgn,
    "tridet": partial(with_pyramid, kind=TriDetConfig),
    "temporalmaxer": partial(with_pyramid, kind=TemporalMaxerConfig),
}


def on_stored_features(run: RunConfig, *, channels: int, folder: str) -> RunConfig:
    """`run` on features that its backbone gave, in `features/FOLDER`; windows keep their length in seconds."""
    windowing = run.data.clips.windowing
    if isinstance(windowing, Slide):
        assert windowing.frames_per_second is not None
        # A stored step stands for so many frames.
        per_step = windowing.num_frames / run.num_steps
        rate = windowing.frames_per_second / per_step
        windowing = replace(windowing, num_frames=run.num_steps, frames_per_second=rate)
    else:
        windowing = replace(windowing, num_frames=run.num_steps)
    # One rank has the whole batch of an end-to-end step.
    clips = run.engine.batch_size * (2 if isinstance(windowing, Slide) else 4)
    return replace(
        run,
        data=DataConfig(shards=Path("features") / folder, clips=ClipConfig(windowing=windowing, workers=2)),
        backbone=BackboneConfig(name="features", feature_channels=channels, rewired=False),
        annealing=AnnealingConfig(),
        engine=replace(run.engine, batch_size=clips, precision="fp32"),
    )


def compose(data: str, backbone: str, localizer: str, *, features: bool) -> RunConfig:
    """The recipe of three names from the tables."""
    part = BACKBONE_PARTS[backbone]
    run = part.build(DATA_PARTS[data]())
    # Once more where the localizer has another grid, for a backbone whose steps follow it.
    run = LOCALIZER_PARTS[localizer](run)
    if run.backbone.frames_per_step is not None:
        run = part.build(run)
    if features:
        run = on_stored_features(run, channels=part.channels, folder=f"{data}_{backbone}")
    return run


def composed_name(data: str, backbone: str, localizer: str, *, features: bool) -> str:
    """What the recipe is called; ActionFormer goes without saying."""
    parts = [data, backbone, *([] if localizer == "actionformer" else [localizer]), *(["features"] if features else [])]
    return "_".join(parts)
