"""Accuracy of a classifier of whole videos: the share whose class is the best one, or among the five best.

Mean class accuracy averages over classes instead, so that a frequent one does not outweigh the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from re2tal.evaluation.coverage import name_some
from re2tal.video_ids import match_ids


@dataclass(frozen=True, slots=True)
class AccuracyReport:
    """Shares from 0 to 1."""

    top1: float
    """Of the videos, those whose class has the highest score."""
    top5: float
    """Those whose class is among the five highest."""
    mean_class_accuracy: float
    """Mean over classes of the top-1 share of their videos; classes without a video do not count."""
    num_videos: int
    videos_without_scores: tuple[str, ...] = ()
    """Those of them that count as wrong for this reason."""

    def __str__(self) -> str:
        figures = (
            f"top-1 {100 * self.top1:.2f} %   top-5 {100 * self.top5:.2f} %   mean class accuracy "
            f"{100 * self.mean_class_accuracy:.2f} %   of {self.num_videos} videos"
        )
        if missing := self.videos_without_scores:
            return f"{figures}\nnote: {len(missing)} videos have no scores, and count as wrong: {name_some(missing)}"
        return figures

    def to_json(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def accuracy(scores: Mapping[str, Tensor], truth: Mapping[str, str], *, classes: Sequence[str]) -> AccuracyReport:
    """`scores[video]` (K,) in the order of `classes` against `truth[video]`, the name of its class.

    Among equal scores the class that stands first is the better one. A video without scores counts as wrong, and is
    named. Ids match as in `match_ids`. Raises ValueError for a class that is not among `classes`, and for videos or
    scores that cannot be compared, or if no video has scores.
    """
    if not truth:
        raise ValueError("there is no video with a class to compare with; build shards of trimmed clips")
    renamed = match_ids(scores, truth)
    scores = {renamed.get(video_id, video_id): row for video_id, row in scores.items()}
    if odd := sorted(scores.keys() - truth.keys()):
        # Scores of other videos mostly mean that the wrong subset was given; left out in silence, the mistake would not
        # show.
        raise ValueError(f"scores of {odd[0]!r}, like {len(odd)} in all, belong to no video; give the right subset")
    missing = tuple(video_id for video_id in truth if video_id not in scores)
    if len(missing) == len(truth):
        raise ValueError(f"none of the {len(truth)} videos has scores; give the results of these videos")
    index = {label: number for number, label in enumerate(classes)}
    right: dict[str, list[int]] = {}
    for video_id, label in truth.items():
        if label not in index:
            raise ValueError(f"video {video_id!r} shows {label!r}, which is not among the {len(classes)} classes")
        place = _place(scores[video_id], index[label], video_id) if video_id in scores else len(classes)
        right.setdefault(label, []).append(place)
    places = torch.tensor([place for of_class in right.values() for place in of_class])
    per_class = [sum(place == 0 for place in of_class) / len(of_class) for of_class in right.values()]
    return AccuracyReport(
        top1=(places == 0).double().mean().item(),
        # A video without scores has the place len(classes), also where there are no five classes.
        top5=(places < min(5, len(classes))).double().mean().item(),
        mean_class_accuracy=sum(per_class) / len(per_class),
        num_videos=len(truth),
        videos_without_scores=missing,
    )


def _place(scores: Tensor, true: int, video_id: str) -> int:
    """The number of classes with better scores than the true one."""
    # NaN is neither above nor below the true class's score, so that a diverged classifier would come out as right.
    if not bool(scores.isfinite().all()):
        raise ValueError(f"the scores of video {video_id!r} are not all finite: {scores.tolist()[:5]}")
    better = scores > scores[true]
    # Otherwise a classifier that gives all classes the same score would be right everywhere.
    better[:true] |= scores[:true] == scores[true]
    return int(better.sum())
