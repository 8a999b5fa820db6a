"""Data sets that are known by name: a new one is a row in DATASETS.

A row says how a data set is laid out and usually stored. Where papers average its mAP over thresholds of its own,
these stand under the same name in `re2tal.evaluation.protocols`. Nothing is downloaded: the public sets ask people to
fetch the videos themselves, and links die.
"""

from __future__ import annotations

from dataclasses import dataclass

from re2tal.data.building import dataset_facts
from re2tal.data.building.dataset_facts import DatasetFacts
from re2tal.data.contract.manifest import Encoding, FramesPerSecond


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Facts about a data set."""

    encoding: Encoding
    """How its videos are stored unless the user says otherwise."""
    file_names: tuple[str, ...] = ("{id}", "v_{id}")
    """Names of video files, without suffix."""
    classes: tuple[str, ...] | None = None
    """None: the labels of the annotation file, sorted."""
    blocked: frozenset[str] = frozenset()
    """Videos whose annotations are known to be wrong or empty."""
    subset_pairs: tuple[tuple[str, str], ...] = ()
    """What files call the subset to train on and the one to score, where not "training" and "validation"."""
    facts: DatasetFacts | None = None
    """Of a published data set."""


def find_dataset(name: str) -> DatasetSpec:
    """The row called `name`; ValueError shows the names there are."""
    try:
        return DATASETS[name]
    except KeyError:
        raise ValueError(f"unknown data set {name!r}; known: {sorted(DATASETS)}") from None


_THUMOS_CLASSES = (
    "BaseballPitch",
    "BasketballDunk",
    "Billiards",
    "CleanAndJerk",
    "CliffDiving",
    "CricketBowling",
    "CricketShot",
    "Diving",
    "FrisbeeCatch",
    "GolfSwing",
    "HammerThrow",
    "HighJump",
    "JavelinThrow",
    "LongJump",
    "PoleVault",
    "Shotput",
    "SoccerPenalty",
    "TennisSwing",
    "ThrowDiscus",
    "VolleyballSpiking",
)

_AT_15, _AT_30 = Encoding(FramesPerSecond(15.0)), Encoding(FramesPerSecond(30.0))

DATASETS: dict[str, DatasetSpec] = {
    "own": DatasetSpec(_AT_15),
    # What `re2tal demo` writes.
    "demo": DatasetSpec(Encoding(FramesPerSecond(16.0), short_side=96)),
    # 15 per second and a short side of 256 is what published end-to-end work trains on. Ids have 11 characters and the
    # common packages put v_ before them. Which 198 validation videos the 4,728-video protocol leaves out is in a file
    # that comes with that protocol's features: give it to `re2tal shards build --blocked`.
    "activitynet": DatasetSpec(_AT_15, ("v_{id}", "{id}"), facts=dataset_facts.ACTIVITYNET),
    "thumos14": DatasetSpec(
        _AT_30,
        ("{id}",),
        classes=_THUMOS_CLASSES,
        # Wrong annotations, and none at all: OpenTAD leaves out both, and evaluates 211 of the 213.
        blocked=frozenset({"video_test_0000270", "video_test_0001292"}),
        subset_pairs=(("validation", "test"), ("training", "test")),
        facts=dataset_facts.THUMOS14,
    ),
    "hacs": DatasetSpec(_AT_15, ("v_{id}", "{id}"), facts=dataset_facts.HACS),
    "multithumos": DatasetSpec(
        _AT_30, ("{id}",), subset_pairs=(("training", "test"),), facts=dataset_facts.MULTITHUMOS
    ),
    "fineaction": DatasetSpec(_AT_15, facts=dataset_facts.FINEACTION),
    "epic-kitchens-verb": DatasetSpec(_AT_30, ("{id}",), facts=dataset_facts.EPIC_VERBS),
    "epic-kitchens-noun": DatasetSpec(_AT_30, ("{id}",), facts=dataset_facts.EPIC_NOUNS),
    "ego4d-mq": DatasetSpec(_AT_30, ("{id}",), facts=dataset_facts.EGO4D_MQ),
    "charades": DatasetSpec(_AT_30, ("{id}",), subset_pairs=(("training", "test"),), facts=dataset_facts.CHARADES),
    "urfd": DatasetSpec(_AT_30, facts=dataset_facts.URFD),
    "gmdcsa24": DatasetSpec(_AT_30, facts=dataset_facts.GMDCSA24),
}
