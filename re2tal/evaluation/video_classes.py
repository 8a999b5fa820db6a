"""Classes of whole videos, from a classifier: they name the detections of a class-agnostic detector.

    {"results": {video: [K scores]}, "class": [K names]}

This is the layout of CUHK's file for ActivityNet, the classifier that published class-agnostic results there share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from re2tal.strict_json import brief, read_json, write_json
from re2tal.structures import Detections


@dataclass(frozen=True, slots=True)
class VideoClasses:
    """A classifier's scores by video: `scores[video_id]` (K,) are in the order of `classes`."""

    path: Path
    scores: dict[str, Tensor]
    classes: tuple[str, ...]

    def check(self, video_ids: Iterable[str], *, top_k: int) -> None:
        """Check that `name` will work for these videos, before hours are spent on detection.

        Raises ValueError for a `top_k` that the classes do not allow, and for videos that the file does not know.
        """
        if not 1 <= top_k <= len(self.classes):
            raise ValueError(f"top_k is {top_k}; {self.path} has {len(self.classes)} classes, so give 1 to that many")
        missing = sorted(set(video_ids) - self.scores.keys())
        if missing:
            raise ValueError(
                f"{self.path}: results[{missing[0]!r}] is missing, like {len(missing)} of the videos to look at; add "
                f"their {len(self.classes)} scores, under the ids that the shards or the names of the files give"
            )

    def name(self, found: Mapping[str, Detections], *, top_k: int) -> dict[str, Detections]:
        """Class-agnostic detections of each video under its `top_k` best classes; labels index `classes`."""
        return {
            video_id: fuse_video_classes(one, self.scores[video_id], top_k=top_k) for video_id, one in found.items()
        }


def read_video_classes(path: Path | str) -> VideoClasses:
    """Read a classifier's file.

    Raises FileNotFoundError, and ValueError naming file, key and value for anything but K distinct names and, for every
    video, K finite scores that are not negative.
    """
    path = Path(path)
    document = read_json(path)
    if not isinstance(document, dict) or not {"results", "class"} <= document.keys():
        raise ValueError(
            f'{path} needs "results", which maps video ids to lists of scores, and "class", a list of names, at the '
            f"top; its top level is {brief(list(document) if isinstance(document, dict) else document)}"
        )
    classes, results = document["class"], document["results"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) and name for name in classes):
        raise ValueError(f"{path}: class is {brief(classes)}; give the list of the classes' names")
    if len(set(classes)) < len(classes):
        repeated = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"{path}: class names {repeated!r} twice; give each of the {len(classes)} scores its own name")
    if not isinstance(results, dict):
        raise ValueError(f"{path}: results is {brief(results)}; give an object that maps video ids to lists of scores")
    scores = {
        video_id: _scores(row, where=f"{path}: results[{video_id!r}]", num_classes=len(classes))
        for video_id, row in results.items()
    }
    return VideoClasses(path, scores, tuple(classes))


def write_video_classes(path: Path, scores: Mapping[str, Tensor], classes: Sequence[str]) -> None:
    """The inverse of `read_video_classes`: `scores[video_id]` (K,) in the order of `classes`."""
    results = {video_id: row.tolist() for video_id, row in scores.items()}
    write_json(path, {"class": list(classes), "results": results})


def _scores(row: Any, *, where: str, num_classes: int) -> Tensor:
    if not isinstance(row, list):
        raise ValueError(f"{where} is {brief(row)}; give a list of {num_classes} scores, one for each class")
    if len(row) != num_classes:
        raise ValueError(f'{where} holds {len(row)} scores, and "class" {num_classes} names; give one for each name')
    for position, score in enumerate(row):
        if type(score) not in (int, float) or not 0 <= score < math.inf:
            raise ValueError(f"{where}[{position}] is {brief(score)}; give a finite score of 0 or more, no logit")
    return torch.tensor(row, dtype=torch.float64)


def fuse_video_classes(detections: Detections, class_scores: Tensor, *, top_k: int) -> Detections:
    """Class-agnostic detections named by a classifier of whole videos: one copy for each of its `top_k` classes.

    `class_scores` (K,) are the classifier's; a copy's score is the detection's times its class's, its label the class.
    """
    if not 1 <= top_k <= len(class_scores):
        raise ValueError(
            f"top_k={top_k} must lie between 1 and the {len(class_scores)} classes of the video classifier"
        )
    best, classes = class_scores.sort(descending=True, stable=True)
    num = len(detections)
    return Detections(
        detections.segments.repeat(top_k, 1),
        (best[:top_k, None].to(detections.scores) * detections.scores).flatten(),
        classes[:top_k].to(detections.labels.device).repeat_interleave(num),
    )
