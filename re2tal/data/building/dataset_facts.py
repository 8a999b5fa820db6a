"""What is known of published data sets: how much their annotation files hold, their traps, and where to get them.

Numbers are those of the published files, counted, or, where `published` says so, as papers and the sets' own pages give
them. What nobody says is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SubsetFacts:
    """What a subset holds; more than one number where files of the same set differ."""

    videos: tuple[int, ...]
    actions: tuple[int, ...] = ()
    """Without "Ambiguous"; empty where no exact number is known."""
    remark: str = ""
    """What the numbers stand for."""


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """What people need to know before they use a data set."""

    title: str
    num_classes: int
    subsets: Mapping[str, SubsetFacts]
    """By the names that recipes look for: "training", "validation", "test"."""
    source: str
    """Where to get videos and annotations, and what has to be signed."""
    thresholds: str | None = None
    """Row of re2tal.evaluation's thresholds; None where papers agree on none."""
    num_annotated_classes: int | None = None
    """Classes that occur, where some never do."""
    total_actions: int | None = None
    """Of all subsets, where only their sum is known."""
    published: bool = False
    """The numbers of videos were published, and not counted in the file."""
    blocked: str = ""
    """Which lists of videos to leave out are in use."""
    traps: tuple[str, ...] = ()


ACTIVITYNET = DatasetFacts(
    title="ActivityNet-1.3",
    num_classes=200,
    subsets={
        "training": SubsetFacts((10024,)),
        "validation": SubsetFacts((4926, 4728), remark="4,728 without the blocked list"),
        "test": SubsetFacts((5044,), remark="labels are withheld"),
    },
    source="activity-net.org; missing videos are to be requested there with a form",
    thresholds="activitynet",
    published=True,
    blocked="a JSON list of 198 validation videos comes with the features that many papers use; give it to --blocked",
    traps=(
        "ids are YouTube's and may begin with - or _; files are mostly called v_ID, results use the bare ID",
        "some actions end after their video, and some cover nearly all of it",
        "re-encoded files last other times than the annotation says; times are those of the annotation",
        "of the 19,994 videos people report to have got 17,700 to 18,500 from YouTube",
    ),
)
THUMOS14 = DatasetFacts(
    title="THUMOS14",
    num_classes=20,
    subsets={
        "training": SubsetFacts((200,), (3007,), remark="officially the validation set"),
        "validation": SubsetFacts(
            (213, 212, 211, 210), (3358, 3325, 3311), remark="officially the test set; papers score 213 to 210 of it"
        ),
    },
    source="crcv.ucf.edu/THUMOS14",
    thresholds="thumos14",
    blocked="video_test_0001292 (only Ambiguous), video_test_0000270 (annotated past its end), as OpenTAD does",
    traps=(
        "papers train on the official validation set and score on the test set; some files call these training and "
        "validation, others validation and test. Here they become training and validation",
        "a score depends on which of the 210 to 213 test videos count: OpenTAD 211, ActionFormer 212, VSGN 210",
        "each CliffDiving is annotated as Diving too, with the same times",
        "89 training and 99 test segments are labelled Ambiguous: neither trained on nor scored",
        "most videos have 30 frames a second, some 29.97, 25 or 24; VSGN's file has times as strings",
    ),
)
HACS = DatasetFacts(
    title="HACS Segments 1.1",
    num_classes=200,
    subsets={
        "training": SubsetFacts((37618,)),
        "validation": SubsetFacts((5982,)),
        "test": SubsetFacts((5988,), remark="labels are withheld"),
    },
    source="hacs.csail.mit.edu and github.com/hangzhaomit/HACS-dataset; missing videos on request",
    thresholds="hacs",
    published=True,
    traps=(
        "durations are strings; version 1.1.1 has slightly fewer videos",
        "files are called v_ID, in a folder per class",
        "some segments last no time: --invalid-segments drop",
        "HACS_clips_*.csv is another task: clips of 2 seconds, with negatives",
    ),
)
MULTITHUMOS = DatasetFacts(
    title="MultiTHUMOS",
    num_classes=65,
    subsets={"training": SubsetFacts((200,), (18482,)), "validation": SubsetFacts((213,), (20208,))},
    source="ai.stanford.edu/~syyeung/everymoment.html for annotations; the videos are THUMOS14's",
    thresholds="multithumos",
    traps=(
        "classes are numbers from 1: convert with --classes class_list.txt",
        "65 segments end after their video (one at 4000.36 s of 1,315 s), 7 end where or before they start: conversion "
        "leaves out the 7, --invalid-segments drop the others",
        "video_test_0000270 and video_test_0001292 are in it; its test set is the subset to score",
        "several actions at once nearly everywhere; the original score is mAP per frame",
    ),
)
FINEACTION = DatasetFacts(
    title="FineAction",
    num_classes=106,
    subsets={
        "training": SubsetFacts((8440,)),
        "validation": SubsetFacts((4174,)),
        "test": SubsetFacts((4118,)),
    },
    source="deeperaction.github.io/datasets/fineaction",
    thresholds="fineaction",
    published=True,
    traps=("about 103,000 actions, many shorter than 2 s: store enough frames a second", "several classes in a video"),
)
_EPIC = {
    "training": SubsetFacts((495,), (67217,)),
    "validation": SubsetFacts((138,), (9668,)),
    "test": SubsetFacts((67,), (0,), remark="13,092 segments without labels"),
}
_EPIC_SOURCE = "epic-kitchens.github.io; annotations at github.com/epic-kitchens/epic-kitchens-100-annotations"
_EPIC_TRAPS = (
    "start_frame and stop_frame count extracted frames at 50 or 59.94 a second, not those of the videos: times count",
    "durations are in EPIC_100_video_info.csv: convert it together with the others",
    "labels are numbers of three digits, such as id_003; actions overlap heavily",
    "an action of the official score is verb * 300 + noun",
)
EPIC_VERBS = DatasetFacts(
    title="EPIC-Kitchens-100, verbs",
    num_classes=97,
    subsets=_EPIC,
    source=_EPIC_SOURCE,
    thresholds="epic-kitchens",
    traps=(*_EPIC_TRAPS, "all 97 verbs occur in training, 78 in validation"),
)
EPIC_NOUNS = DatasetFacts(
    title="EPIC-Kitchens-100, nouns",
    num_classes=300,
    num_annotated_classes=293,
    subsets=_EPIC,
    source=_EPIC_SOURCE,
    thresholds="epic-kitchens",
    traps=(*_EPIC_TRAPS, "289 nouns occur in training, 293 in training and validation, though ids go to 299"),
)
EGO4D_MQ = DatasetFacts(
    title="Ego4D moment queries",
    num_classes=110,
    subsets={
        name: SubsetFacts((videos,), remark="clips of version 1; version 2 has more")
        for name, videos in (("training", 1486), ("validation", 521), ("test", 481))
    },
    source="ego4d-data.org; a licence has to be signed",
    thresholds="ego4d-mq",
    published=True,
    traps=(
        "the unit is the clip of 8 minutes: ids are clip_uid, times count from the clip's start",
        "each clip has several annotators, whose labels are put together; only primary labels count",
        "OpenTAD leaves out clips without a primary label, and those under 10 or over 100 frames a second",
        "labels hold commas, brackets, quotes and slashes",
        "Recall@1x and @5x are reported too: `re2tal evaluate --top-kx 1 5`",
    ),
)
CHARADES = DatasetFacts(
    title="Charades",
    num_classes=157,
    subsets={"training": SubsetFacts((7985,)), "validation": SubsetFacts((1863,), remark="officially the test set")},
    total_actions=66500,
    source="prior.allenai.org/projects/charades",
    thresholds="charades",
    traps=(
        "19,623 actions (30 %) end after their video, none by more than 2 s; 7 end where or before they start",
        "223 videos have no action",
        "classes are numbers from 0 (c000): convert with --classes",
        "the original score is mAP per frame, of 25 frames a video",
        "features were made at 24 frames a second, re-encoded videos have 30",
    ),
)
URFD = DatasetFacts(
    title="UR Fall Detection, camera 0",
    num_classes=3,
    subsets={
        "training": SubsetFacts((46,), (56,)),
        "validation": SubsetFacts((24,), (36,), remark="fall-19 to 30, adl-24 to 30 and 36 to 40"),
    },
    source="fenix.ur.edu.pl/~mkepski/ds/uf.html (CC BY-NC-SA 4.0)",
    traps=(
        "frames come as PNG, labels per frame: -1, 0, 1; the segments falling, lying and lying_down are made of them, "
        "and the split is not an official one",
        "falling is always the 30 frames before lying",
        "18 training and 6 validation videos have no action; adl-12 to 23 are very dark",
    ),
)
GMDCSA24 = DatasetFacts(
    title="GMDCSA24, a sample",
    num_classes=9,
    subsets={"training": SubsetFacts((13,), (29,)), "validation": SubsetFacts((10,), (19,), remark="subject 3")},
    source="Alam et al. 2024: the data set of that name on GitHub (MIT)",
    traps=(
        "numbers are those of 23 labelled videos; the whole set has more",
        "several actions at once; five of the nine classes occur three times or less",
    ),
)
