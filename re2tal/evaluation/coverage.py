"""Which videos and labels of the predictions meet the ground truth. Without these facts a score cannot be read.

Ids that differ only in a video file's suffix, in Unicode form, or in the `v_` that ActivityNet's packages put before
them, are taken for one video, if that is unambiguous (`re2tal.video_ids`).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_NAMED = 5
"""Names in one line of text; JSON holds all."""
LIKELY_LIMIT = 20
"""From so many on, equal numbers of predictions in several videos point to a limit, and equal scores to a constant."""
LATEST_SHARE = 0.05
"""Where all predictions end before this share of the last true end, they are probably not in seconds."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The scored videos and predictions, and those that do not match."""

    subset: str
    """Of the ground truth."""
    num_videos: int
    """Videos that were scored."""
    num_videos_without_actions: int
    """Those of them that have no true action that counts."""
    class_agnostic: bool
    """All labels counted as one."""
    num_blocked_ids: int
    """Ids on the list of blocked videos."""
    blocked_videos: tuple[str, ...]
    """Videos of the subset that are on it, and were left out."""
    num_predictions: int
    """Predictions outside blocked videos."""
    num_in_subset: int
    """Those of them for videos of the subset."""
    num_met: int
    """Those of them for videos of the subset, with a label that has a true action there."""
    num_predicted_videos: int
    """Videos of the subset that the predictions name, be it without any."""
    renamed_videos: Mapping[str, str]
    """Id in the predictions -> id in the ground truth, where they differ by suffix or prefix."""
    videos_without_predictions: tuple[str, ...]
    """Videos that have true actions and no prediction."""
    unknown_videos: Mapping[str, int]
    """Videos that are not in the subset -> their predictions, which are false positives."""
    unknown_labels: Mapping[str, int]
    """Labels without a true action in the subset -> their predictions, which no AP counts."""
    reversed_segments: Mapping[str, int]
    """Video -> predictions that end before they start, which are false positives."""
    known_labels: tuple[str, ...]
    """Labels that have a true action."""
    num_left_out: int = 0
    """True actions that do not count under the protocol: empty or reversed ones, and repetitions."""
    labels_left_out: tuple[str, ...] = ()
    """Labels of which these are all true actions, so that they are no classes of the score."""
    never_predicted: tuple[str, ...] = ()
    """Known labels that no prediction has."""
    cut_videos: Mapping[str, int] = field(default_factory=dict)
    """Videos with more detections than suppression.max_per_video -> how many it cut, at most."""
    is_limit_known: bool = False
    """Whether it is known that no other video was cut; a file does not say it."""
    most_per_video: int = 0
    """The most predictions of any video."""
    videos_at_most: tuple[str, ...] = ()
    """Videos with so many; where the limit is not known, and several share it, it looks like one."""
    num_repeated: int = 0
    """Predictions that repeat another: video, segment, label and score."""
    num_without_length: int = 0
    """Predictions that end where they start."""
    num_after_end: int = 0
    """Predictions that start after the end of their video."""
    num_truths_after_end: int = 0
    """True actions that start after the end of their video."""
    last_seconds: tuple[float, float] = (0.0, 0.0)
    """The last end of a prediction for a video of the subset, and that of a true action."""
    is_one_score: bool = False
    """All scores are equal, though there are 20 or more."""

    def check(self) -> None:
        """ValueError if no prediction meets the ground truth, so that a score would only say that names differ.

        Videos of the subset that are listed without any prediction are no fault: the score is 0.
        """
        # A detector may list videos and find nothing in them, which is a score of 0. Predictions for other videos only,
        # or none of the subset named at all, is a wrong file.
        if not self.num_predicted_videos or (self.num_predictions and not self.num_in_subset):
            raise ValueError(
                f"no predicted video is among the {self.num_videos} of subset {self.subset!r}: predicted are "
                f"{name_some(self.unknown_videos)}; give the annotations and the subset of these videos"
            )
        if self.num_met or not self.num_predictions:
            return
        raise ValueError(
            f"no predicted label has a true action in subset {self.subset!r}: predicted are "
            f"{name_some(self.unknown_labels)}, and there {name_some(self.known_labels)}; rename the labels, or score "
            "class-agnostic"
        )

    def facts(self) -> str:
        """One line: what was scored."""
        blocked = "no blocked list"
        if self.num_blocked_ids:
            blocked = f"{len(self.blocked_videos)} of the {self.num_blocked_ids} videos on the blocked list left out"
        empty = f", {self.num_videos_without_actions} without true actions" if self.num_videos_without_actions else ""
        agnostic = "class-agnostic" if self.class_agnostic else "by class"
        return f"subset {self.subset}: {self.num_videos} videos{empty}; {blocked}; {agnostic}"

    def notes(self) -> list[str]:
        """One line for each thing that did not meet; empty where all is as it should be."""
        num_with_actions = self.num_videos - self.num_videos_without_actions
        notes = []
        if self.num_blocked_ids and not self.blocked_videos:
            notes.append(f"none of the {self.num_blocked_ids} blocked ids is in the subset")
        if self.renamed_videos:
            pairs = [f"{ours!r} is {theirs!r}" for ours, theirs in self.renamed_videos.items()]
            notes.append(f"{len(pairs)} videos matched without suffix or prefix: {_listed(pairs)}")
        if self.num_left_out:
            classes = f", and with them the classes {name_some(self.labels_left_out)}" if self.labels_left_out else ""
            notes.append(
                f"{self.num_left_out} true actions are left out under this protocol{classes}: they end where they "
                "start or before, or repeat another"
            )
        if missing := self.videos_without_predictions:
            notes.append(
                f"{len(missing)} of {num_with_actions} videos with true actions have no predictions: "
                f"{name_some(missing)}"
            )
        if self.unknown_videos:
            number = sum(self.unknown_videos.values())
            notes.append(
                f"{len(self.unknown_videos)} predicted videos are not in the subset (their {number} predictions count "
                f"as false): {name_some(self.unknown_videos)}"
            )
        # Spelt in two ways in one file, "golf swing" beside "Golf_Swing", a class is two, and each prediction misses
        # one.
        folded = Counter(_folded(label) for label in self.known_labels)
        if twins := [label for label in self.known_labels if folded[_folded(label)] > 1]:
            notes.append(f"labels that are nearly the same are scored as different classes: {name_some(twins)}")
        if self.unknown_labels:
            number = sum(self.unknown_labels.values())
            notes.append(
                f"{len(self.unknown_labels)} predicted labels have no true action in the subset (their {number} "
                f"predictions count nowhere): {_listed([self._hinted(label) for label in self.unknown_labels])}"
            )
        if self.never_predicted:
            notes.append(
                f"{len(self.never_predicted)} of {len(self.known_labels)} classes with true actions are never "
                f"predicted: {name_some(self.never_predicted)}"
            )
        if self.reversed_segments:
            number = sum(self.reversed_segments.values())
            notes.append(
                f"{number} predictions end before they start, and count as false, or by protocol official as right if "
                f"as long as a true action: {name_some(self.reversed_segments)}"
            )
        notes += self._odd_numbers()
        if self.cut_videos:
            notes.append(cut_by_limit(self.cut_videos))
        # One video has the most predictions in any file; that several have exactly as many is hardly chance.
        if not self.is_limit_known and len(self.videos_at_most) > 1 and self.most_per_video >= LIKELY_LIMIT:
            notes.append(
                f"{len(self.videos_at_most)} videos have exactly {self.most_per_video} predictions, the most of any: "
                "a limit seems to have cut them, long videos too"
            )
        return notes

    def _odd_numbers(self) -> list[str]:
        """Notes on segments and scores that repeat, are constant, or are probably in another unit."""
        notes = []
        if self.num_repeated:
            notes.append(f"{self.num_repeated} predictions repeat another in all they say, and count as false")
        # More than half, here and below: a few odd segments are what a detector makes, most of them a mistake.
        if self.num_without_length > self.num_in_subset / 2:
            notes.append(
                f"{self.num_without_length} of {self.num_in_subset} predictions have no length, and match nothing: the "
                "localizer has not learned to regress boundaries; train longer, or at another rate"
            )
        if self.num_truths_after_end:
            notes.append(
                f"{self.num_truths_after_end} true actions start after the end of their video; check the annotations"
            )
        # Where truths too start after the end, it is the annotations' durations that are wrong, not the predictions.
        elif self.num_after_end > self.num_in_subset / 2:
            notes.append(
                f"{self.num_after_end} of {self.num_in_subset} predictions start after the end of their video; give "
                "segments in seconds, not in frames or milliseconds"
            )
        found, true = self.last_seconds
        if self.num_in_subset and found < LATEST_SHARE * true:
            notes.append(
                f"no prediction ends after {found:.4g} s, and the last true action ends at {true:.4g} s; give segments "
                "in seconds, not in shares of the video or minutes"
            )
        if self.is_one_score:
            notes.append("all scores are equal, so that precision is that of an arbitrary order")
        return notes

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that `json` writes."""
        return {**asdict(self), "notes": self.notes()}

    def _hinted(self, label: str) -> str:
        near = [known for known in self.known_labels if _folded(known) == _folded(label)]
        if not near:
            return repr(label)
        # Of other Unicode forms both would look the same.
        show = ascii if unicodedata.normalize("NFC", near[0]) == unicodedata.normalize("NFC", label) else repr
        return f"{show(label)}, which is nearly {show(near[0])}"


def cut_by_limit(videos: Mapping[str, int]) -> str:
    """What the limit on detections did to these videos, each with how many more it had at most."""
    return (
        f"{len(videos)} videos reach the limit of detections (suppression.max_per_video), which left out up to "
        f"{sum(videos.values())} more: {name_some(videos)}"
    )


def _folded(label: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", label).casefold().replace("_", " ").split())


def name_some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    return _listed([repr(name) for name in names])


def _listed(texts: list[str]) -> str:
    shown = ", ".join(texts[:MAX_NAMED])
    return f"{shown} and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else shown or "none"
