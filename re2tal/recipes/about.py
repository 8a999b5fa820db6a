"""What is said of a recipe beside its settings: for how many ranks it was made, which mAP is published of its source,
and in what it differs from that.

Figures are those that sources publish of their own trained weights; none was reproduced here. Average mAP is over tIoU
0.3 to 0.7 on THUMOS14, 0.5 to 0.95 on ActivityNet-1.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from re2tal.config import AnyRun, RecognitionConfig, RunConfig
from re2tal.data.streaming.windows import ResizeWhole
from re2tal.localizers.vsgn.config import VSGNConfig

RE2TAL, ADATAD, AF = "OpenTAD, configs/re2tal", "OpenTAD, configs/adatad", "ActionFormer's release"
CUHK = "with CUHK's video classes"

PUBLISHED: dict[str, tuple[str, str]] = {
    "thumos14_swin_tiny": ("67.10", RE2TAL),
    "thumos14_re2swin_tiny": ("66.89", RE2TAL),
    "thumos14_slowfast_r101": ("69.97", RE2TAL),
    "thumos14_re2slowfast_r101": ("70.19", RE2TAL),
    "activitynet_swin_tiny": ("36.89", f"{RE2TAL}, {CUHK}"),
    "activitynet_re2swin_tiny": ("36.47", f"{RE2TAL}, {CUHK}"),
    "activitynet_slowfast_r101": ("37.35", f"{RE2TAL}, {CUHK}"),
    "activitynet_re2slowfast_r101": ("37.55", f"{RE2TAL}, {CUHK}"),
    "thumos14_actionformer_features": ("66.83", f"{AF}, on I3D"),
    "activitynet_actionformer_features": ("36.56", f"{AF}, on TSP, {CUHK}"),
    "thumos14_actionformer_opentad_features": ("68.44", "OpenTAD, on I3D"),
    "thumos14_actionformer_internvideo2_features": ("71.86", "OpenTAD, on InternVideo2-6B"),
    "activitynet_actionformer_internvideo2_features": ("41.19", "OpenTAD, on InternVideo2-6B"),
    "thumos14_tridet_features": ("69.3", "TriDet, on I3D"),
    "thumos14_tridet_videomae2_giant_features": ("70.1", "TriDet, on VideoMAE V2-g"),
    "activitynet_tridet_features": ("36.8", "TriDet"),
    "thumos14_vsgn_features": ("50.2", "VSGN, the paper, on TSN"),
    "activitynet_vsgn_features": ("36.89", f"OpenTAD, on TSP, {CUHK}"),
    **{
        f"{data}_adatad_videomae_{size}": (figure, source)
        for data, source, figures in (
            ("thumos14", ADATAD, ("69.03", "71.14", "73.51", "74.95", "75.06", "77.07")),
            ("activitynet", f"{ADATAD}, {CUHK}", ("37.81", "38.35", "39.21", "39.31", "39.77", "39.86")),
        )
        for size, figure in zip(("small", "base", "large", "huge", "giant", "giant_224"), figures, strict=True)
    },
}
"""Recipe -> average mAP in percent, and whose."""

_ROUNDING = "segments and scores are not rounded before windows are merged; OpenTAD rounds to 2 and 4 decimal places"
_DECAY = "biases, norms and position tables of the backbone are not decayed; the source decays them"
_BF16 = "bf16; the source trains in fp16 with loss scaling"
_RATE = (
    "frames are taken at a fixed rate; the source takes every {} of each video's own rate. Of 30 a second they are "
    "the same; of 25 or 24, as few videos have, its windows last 1.2 or 1.25 times as long. As it does: shards built "
    "with --copy, --data.clips.windowing.frames-per-second None --data.clips.windowing.frame-stride {}"
)
_WHOLE_FRAMES = (
    "starts and ends of true actions keep their fractions; the source cuts them to whole frames of the video"
)
_BLOCKED = (
    "every validation video of the shards counts; published figures are of 4,728 videos: give their list of blocked "
    "ones, which does not come with this package, as --evaluation.blocked-videos FILE"
)
_CHECKPOINTS = "the input of every block is kept, as the source's checkpoints do"
_THUMOS = (_RATE.format("second frame", 2), _WHOLE_FRAMES, _ROUNDING)
_END_TO_END = {"thumos14": (*_THUMOS, _DECAY, _BF16), "activitynet": (_BLOCKED, _ROUNDING, _DECAY, _BF16)}
_ADATAD_RATE = _RATE.format("fourth frame (second, at 1536 frames)", "4 (2)")
_ADATAD = {"thumos14": (_ADATAD_RATE, _WHOLE_FRAMES, _ROUNDING, _BF16), "activitynet": (_BLOCKED, _ROUNDING, _BF16)}
_AF = {
    "thumos14": (
        "test videos of more than 2304 steps are cut into windows that overlap by half; the source takes them whole",
    ),
    "activitynet": (_BLOCKED.replace("published figures", "OpenTAD's figures"),),
}
_UNTRIED = "untried: no source publishes settings for this combination; they are put together from those of its parts"


@dataclass(frozen=True, slots=True)
class About:
    """What a recipe is made for, and what may be expected of it."""

    ranks: int
    """For how many it was made: together with its batch they set how many clips a step has."""
    expected: str
    """Published average mAP of its source, in percent; empty where there is none."""
    source: str
    """Whose settings, or figure."""
    differs: tuple[str, ...]
    """In what it differs from its source, sentence by sentence."""


def about(name: str, run: AnyRun) -> About:
    """What is known of recipe `name`, whose settings are `run`."""
    expected, source = PUBLISHED.get(name, ("", ""))
    return About(ranks_of(name, run), expected, source, _differences(name, run))


def ranks_of(name: str, run: AnyRun) -> int:
    """The number of ranks that recipe `name` was made for."""
    if isinstance(run, RecognitionConfig):
        return 8 if name.startswith("kinetics") else 2
    if run.backbone.name == "features" or name.startswith("demo"):
        return 1
    if name == "activitynet_adatad_videomae_giant_224":
        return 8
    return 4 if isinstance(run.data.clips.windowing, ResizeWhole) else 2


def _differences(name: str, run: AnyRun) -> tuple[str, ...]:
    if isinstance(run, RecognitionConfig) or name.startswith("demo"):
        return ()
    data = name.partition("_")[0]
    if name in PUBLISHED and "adatad" in name:
        return _ADATAD[data]
    if name in PUBLISHED and run.backbone.name != "features":
        plain = (_CHECKPOINTS,) if run.backbone.beta == 0 else ()
        return (*_END_TO_END[data], *plain)
    if "vsgn_features" in name and name in PUBLISHED:
        return _vsgn_differences(run)
    if name.startswith(tuple(f"{data}_{one}" for one in ("actionformer", "tridet", "temporalmaxer"))):
        other = "schedule, batch and suppression are those of the ActionFormer recipe"
        return (*_AF.get(data, ()), *([] if name.endswith("actionformer_features") else [other]))
    if name.endswith("_11gb"):
        return (*_END_TO_END[data], "one clip at a time, in fp16, within 10 GB by plan; the sum of a step is the same")
    return (_UNTRIED,)


def _vsgn_differences(run: RunConfig) -> tuple[str, ...]:
    assert isinstance(run.localizer, VSGNConfig)
    if run.localizer.variant == "opentad":
        return (_BLOCKED, "the head's batch is on one rank")
    return (
        "half of the windows are drawn short, at random; the source lists long and short ones, and takes each once",
        "one soft-NMS per class; the source first drops overlaps above 0.4 within a window, and segments over 50 s",
    )
