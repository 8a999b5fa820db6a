"""Scores of a classifier of whole videos, as a file, and class-agnostic detections that they name.

    {"results": {video: [K scores]}, "class": [K names]}     CUHK's file for ActivityNet; "classes" serves too
    {"results": {video: [[K logits]]}, "class": [K names]}   TCANet's for HACS; softmax makes probabilities of them
    FILE.npy, (V, 101) or wider                              UntrimmedNet's for THUMOS-14: row v is that of test video
                                                             v + 1, column k that of class k + 1 of UCF101

InternVideo's and InternVideo2's have the first layout. Published results multiply a detection's score by its class's
(CUHK, UntrimmedNet, TCANet), or take the square root of that (InternVideo).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from re2tal.evaluation.coverage import name_some
from re2tal.strict_json import brief, read_json, write_json
from re2tal.structures import Detections
from re2tal.video_ids import match_ids

logger = logging.getLogger(__name__)

Fusion = Literal["product", "square-root"]
"""Of a detection's score and its class's: their product, or the square root of that."""

# fmt: off
UCF101_OF_THUMOS = {
    "BaseballPitch": 7, "BasketballDunk": 9, "Billiards": 12, "CleanAndJerk": 21, "CliffDiving": 22,
    "CricketBowling": 23, "CricketShot": 24, "Diving": 26, "FrisbeeCatch": 31, "GolfSwing": 33, "HammerThrow": 36,
    "HighJump": 40, "JavelinThrow": 45, "LongJump": 51, "PoleVault": 68, "Shotput": 79, "SoccerPenalty": 85,
    "TennisSwing": 92, "ThrowDiscus": 93, "VolleyballSpiking": 97,
}
# fmt: on
"""Classes of THUMOS-14's detection task -> their number in UCF101, from 1, as its annotation files are numbered."""


@dataclass(frozen=True, slots=True)
class VideoClasses:
    """A classifier's scores by video: `scores[video_id]` (K,) are in the order of `classes`."""

    path: Path
    scores: dict[str, Tensor]
    classes: tuple[str, ...]
    fusion: Fusion = "product"

    def check(self, video_ids: Iterable[str], *, top_k: int) -> None:
        """Check that `name` will work for these videos, before hours are spent on detection.

        Raises ValueError for a `top_k` that the classes do not allow, and where the file knows none of the videos.
        Warns, with names, where it does not know some.
        """
        if not 1 <= top_k <= len(self.classes):
            raise ValueError(f"top_k is {top_k}; {self.path} has {len(self.classes)} classes, so give 1 to that many")
        wanted = set(video_ids)
        known = self._by_wanted_id(wanted)
        missing = sorted(wanted - known.keys())
        if wanted and not known:
            raise ValueError(
                f"{self.path}: results[{missing[0]!r}] is missing, like all {len(missing)} videos to look at; add "
                f"their {len(self.classes)} scores, under the ids that the shards or the names of the files give"
            )
        if missing:
            logger.warning(
                "%s has no scores of %d of the %d videos, so their detections are left out, and count as missed: %s",
                self.path,
                len(missing),
                len(wanted),
                name_some(missing),
            )

    def name(self, found: Mapping[str, Detections], *, top_k: int) -> dict[str, Detections]:
        """Class-agnostic detections of each video under its `top_k` best classes, best first; labels index `classes`.

        A video that the file does not know has none.
        """
        known = self._by_wanted_id(found.keys())
        none = Detections(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.int64), num_cut=0)
        return {
            video_id: _best_first(fuse_video_classes(one, known[video_id], top_k=top_k, fusion=self.fusion))
            if video_id in known
            else none
            for video_id, one in found.items()
        }

    def _by_wanted_id(self, wanted: Iterable[str]) -> dict[str, Tensor]:
        """The scores of those of `wanted` that the file knows, be it without suffix or prefix."""
        # Kept as a list, as it is gone through twice, and may be an iterator.
        renamed = match_ids(wanted := list(wanted), self.scores)
        as_there = {video_id: renamed.get(video_id, video_id) for video_id in wanted}
        return {ours: self.scores[theirs] for ours, theirs in as_there.items() if theirs in self.scores}


def read_video_classes(path: Path | str, *, fusion: Fusion = "product") -> VideoClasses:
    """Read a classifier's file, in one of the layouts above.

    Raises FileNotFoundError, and ValueError naming file, key and value for anything but K distinct names and, for every
    video, K finite scores that are not negative, or K finite logits in TCANet's layout.
    """
    path = Path(path)
    # As in ActionFormer's package of THUMOS-14.
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise ValueError(f"{path} is a pickle, which can run code when it is read; write its scores as JSON")
    if path.suffix.lower() == ".npy":
        return VideoClasses(path, _read_untrimmednet(path), tuple(UCF101_OF_THUMOS), fusion)
    document = read_json(path)
    # CUHK's file says "class", which comes first where a file has both.
    names = "class" if isinstance(document, dict) and "class" in document else "classes"
    if not isinstance(document, dict) or not {"results", names} <= document.keys():
        raise ValueError(
            f'{path} needs "results", which maps video ids to lists of scores, and "class", a list of names, at the '
            f"top; its top level is {brief(list(document) if isinstance(document, dict) else document)}"
        )
    classes, results = document[names], document["results"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) and name for name in classes):
        raise ValueError(f"{path}: {names} is {brief(classes)}; give the list of the classes' names")
    if len(set(classes)) < len(classes):
        repeated = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(
            f"{path}: {names} names {repeated!r} twice; give each of the {len(classes)} scores its own name"
        )
    if not isinstance(results, dict):
        raise ValueError(f"{path}: results is {brief(results)}; give an object that maps video ids to lists of scores")
    scores = {
        video_id: _scores(row, where=f"{path}: results[{video_id!r}]", num_classes=len(classes))
        for video_id, row in results.items()
    }
    return VideoClasses(path, scores, tuple(classes), fusion)


def _read_untrimmednet(path: Path) -> dict[str, Tensor]:
    """THUMOS-14's test videos -> (20,) scores."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; check the path")
    try:
        table = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a table of numbers: {error}; give UntrimmedNet's scores as plain .npy"
        ) from None
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind != "f" or table.shape[1] < 101:
        found = f"{table.dtype} {table.shape}" if isinstance(table, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds {found}; UntrimmedNet's scores are numbers (videos, 101 classes or more)")
    # Numbers of UCF101 begin at 1, columns at 0.
    used = table[:, np.array(list(UCF101_OF_THUMOS.values())) - 1].astype(np.float64)
    if not np.isfinite(used).all() or used.min(initial=0) < 0:
        row, column = np.argwhere(~np.isfinite(used) | (used < 0))[0]
        raise ValueError(f"{path}: row {row} holds {used[row, column]}; give finite scores of 0 or more, no logits")
    return {f"video_test_{number:07d}": torch.from_numpy(row) for number, row in enumerate(used, start=1)}


def write_video_classes(
    path: Path, scores: Mapping[str, Tensor], classes: Sequence[str], *, note: str | None = None
) -> None:
    """The inverse of `read_video_classes`: `scores[video_id]` (K,) in the order of `classes`; `note`: for readers."""
    results = {video_id: row.tolist() for video_id, row in scores.items()}
    write_json(path, {"class": list(classes), "results": results} | ({"note": note} if note else {}))


def _scores(row: Any, *, where: str, num_classes: int) -> Tensor:
    # A list in a list is TCANet's: a batch of one.
    is_logits = isinstance(row, list) and len(row) == 1 and isinstance(row[0], list)
    if is_logits:
        row, where = row[0], f"{where}[0]"
    if not isinstance(row, list):
        raise ValueError(f"{where} is {brief(row)}; give a list of {num_classes} scores, one for each class")
    if len(row) != num_classes:
        raise ValueError(f'{where} holds {len(row)} scores, and "class" {num_classes} names; give one for each name')
    least = -math.inf if is_logits else 0
    for position, score in enumerate(row):
        # By type: true is an int to isinstance. The comparison refuses NaN too.
        if type(score) not in (int, float) or not least <= score < math.inf:
            raise ValueError(f"{where}[{position}] is {brief(score)}; give a finite score of 0 or more, no logit")
    scores = torch.tensor(row, dtype=torch.float64)
    return scores.softmax(0) if is_logits else scores


def _best_first(found: Detections) -> Detections:
    order = found.scores.argsort(descending=True, stable=True)
    return replace(found, segments=found.segments[order], scores=found.scores[order], labels=found.labels[order])


def fuse_video_classes(
    detections: Detections, class_scores: Tensor, *, top_k: int, fusion: Fusion = "product"
) -> Detections:
    """Class-agnostic detections named by a classifier of whole videos: one copy for each of its `top_k` classes.

    `class_scores` (K,) are the classifier's; a copy's score is the detection's times its class's, or the root of that,
    its label the class.
    """
    if not 1 <= top_k <= len(class_scores):
        raise ValueError(
            f"top_k={top_k} must lie between 1 and the {len(class_scores)} classes of the video classifier"
        )
    # Stable: of classes with equal scores the first is taken, on every device.
    best, classes = class_scores.sort(descending=True, stable=True)
    num = len(detections)
    scores = (best[:top_k, None].to(detections.scores) * detections.scores).flatten()
    return Detections(
        detections.segments.repeat(top_k, 1),
        scores.sqrt() if fusion == "square-root" else scores,
        classes[:top_k].to(detections.labels.device).repeat_interleave(num),
        # Each detection that the limit cut would have had a copy of each class.
        num_cut=None if detections.num_cut is None else top_k * detections.num_cut,
    )
