"""All truths and all predictions of an evaluation as flat float64 arrays, one row an instance, in file order.

Videos are numbered in the order of the ground truth. A prediction for a video without a truth has video -1, one of a
class without a truth has class -1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from re2tal.evaluation.protocols import Protocol
from re2tal.structures import Detections, VideoRecord


@dataclass(frozen=True, slots=True)
class Truths:
    """M true actions."""

    videos: np.ndarray
    """(M,) int64, not decreasing"""
    labels: np.ndarray
    """(M,) int64, index into `classes`"""
    segments: np.ndarray
    """(M, 2) seconds"""
    video_ids: tuple[str, ...]
    """the videos that have a truth"""
    classes: tuple[str, ...]
    """in order of first appearance"""


@dataclass(frozen=True, slots=True)
class Predictions:
    """N predictions."""

    videos: np.ndarray
    """(N,) int64 index into `Truths.video_ids`, or -1"""
    labels: np.ndarray
    """(N,) int64 index into `Truths.classes`, or -1"""
    segments: np.ndarray
    """(N, 2) seconds"""
    scores: np.ndarray
    """(N,)"""


def flatten_truths(
    ground_truth: Sequence[VideoRecord], *, protocol: Protocol, blocked_videos: Collection[str]
) -> Truths:
    """What counts of `ground_truth` under `protocol`; ValueError if nothing does, or if a video comes twice."""
    videos, labels, segments = [], [], []
    video_ids: dict[str, int] = {}
    classes: dict[str, int] = {}
    seen: set[str] = set()
    for record in ground_truth:
        if record.video_id in seen:
            raise ValueError(f"the ground truth lists video {record.video_id!r} twice; keep one entry")
        seen.add(record.video_id)
        if record.video_id in blocked_videos:
            continue
        for action in protocol.select(record.actions):
            videos.append(video_ids.setdefault(record.video_id, len(video_ids)))
            labels.append(classes.setdefault(action.label, len(classes)))
            segments.append((action.start_seconds, action.end_seconds))
    if not segments:
        raise ValueError(
            f"none of the {len(ground_truth)} ground-truth videos has an annotated action that counts under protocol "
            f"{protocol.name!r}; check the annotations, the subset's name and the blocked videos"
        )
    return Truths(
        np.array(videos), np.array(labels), np.array(segments, dtype=np.float64), tuple(video_ids), tuple(classes)
    )


def flatten_predictions(
    predictions: Mapping[str, Detections], truths: Truths, *, classes: Sequence[str], blocked_videos: Collection[str]
) -> Predictions:
    """Every prediction outside `blocked_videos`; `classes` are the names that its labels index.

    Raises ValueError for a label that is no index into `classes` and for NaN or infinite numbers, naming the video.
    """
    video_index = {video_id: index for index, video_id in enumerate(truths.video_ids)}
    class_index = {label: index for index, label in enumerate(truths.classes)}
    to_truth_class = np.array([class_index.get(name, -1) for name in classes], dtype=np.int64)
    kept = {video_id: one for video_id, one in predictions.items() if video_id not in blocked_videos}
    ids = list(kept)
    counts = np.array([len(one) for one in kept.values()], dtype=np.int64)
    videos = np.repeat(np.array([video_index.get(video_id, -1) for video_id in ids], dtype=np.int64), counts)
    segments = _stack([one.segments for one in kept.values()], torch.float64).reshape(-1, 2)
    scores = _stack([one.scores for one in kept.values()], torch.float64)
    labels = _stack([one.labels for one in kept.values()], torch.int64)

    wrong = ~(np.isfinite(segments).all(axis=1) & np.isfinite(scores))
    if wrong.any():
        raise ValueError(
            f"predictions for video {_owner(wrong, ids, counts)!r} hold NaN or infinity; did training diverge?"
        )
    wrong = (labels < 0) | (labels >= len(classes))
    if wrong.any():
        raise ValueError(
            f"predictions for video {_owner(wrong, ids, counts)!r} hold label {labels[wrong][0]}, which does not index "
            f"{len(classes)} classes; pass the classes of the localizer that predicted them"
        )
    return Predictions(videos, to_truth_class[labels] if labels.size else labels, segments, scores)


def _stack(tensors: list[torch.Tensor], dtype: torch.dtype) -> np.ndarray:
    flat = torch.cat([tensor.detach().to("cpu", dtype).flatten() for tensor in tensors]) if tensors else torch.zeros(0)
    return flat.to(dtype).numpy()


def _owner(wrong: np.ndarray, ids: list[str], counts: np.ndarray) -> str:
    return ids[int(np.searchsorted(np.cumsum(counts), np.flatnonzero(wrong)[0], side="right"))]
