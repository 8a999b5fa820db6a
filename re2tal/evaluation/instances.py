"""All truths and all predictions of an evaluation as flat float64 arrays, one row an instance, in file order.

Videos are numbered in the order of the ground truth. A prediction for a video without a truth has video -1, one of a
class without a truth has class -1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from re2tal.evaluation.coverage import LIKELY_LIMIT, Coverage
from re2tal.evaluation.protocols import Protocol
from re2tal.structures import Detections, VideoRecord
from re2tal.video_ids import match_ids

FARTHEST = 8
"""Times the last true end: where predictions may start in a video of unknown length. Frames are 8 a second or more."""


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
    subset: str
    scored: tuple[str, ...]
    """all videos that are not blocked, also those without a truth"""
    durations: np.ndarray
    """of these, in seconds; where not known, far behind the last action, or infinite without one"""
    blocked: tuple[str, ...]
    """the others"""
    left_out: tuple[str, ...]
    """labels of the actions that do not count under the protocol, one for each"""


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
    owners: np.ndarray
    """(N,) int64 index into `Truths.scored`, or -1 for a video outside the subset"""
    coverage: Coverage
    """what of them meets the truths"""


def flatten_truths(
    ground_truth: Sequence[VideoRecord], *, protocol: Protocol, blocked_videos: Collection[str]
) -> Truths:
    """The actions that count under `protocol`; ValueError if there is none, or if a video comes twice."""
    videos, labels, segments = [], [], []
    video_ids: dict[str, int] = {}
    classes: dict[str, int] = {}
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    # Under both spellings: predictions may use the list's or the annotations'.
    as_here = match_ids(blocked_videos, [record.video_id for record in ground_truth])
    blocked_ids = {*blocked_videos, *as_here.values()}
    for record in ground_truth:
        if record.video_id in seen:
            raise ValueError(f"the ground truth lists video {record.video_id!r} twice; keep one entry")
        seen.add(record.video_id)
        if record.video_id in blocked_ids:
            continue
        selected = protocol.select(record.actions)
        left_out += Counter(one.label for one in record.actions) - Counter(one.label for one in selected)
        for action in selected:
            # Only videos with an action that counts get a number. AR@AN divides by how many these are.
            videos.append(video_ids.setdefault(record.video_id, len(video_ids)))
            labels.append(classes.setdefault(action.label, len(classes)))
            segments.append((action.start_seconds, action.end_seconds))
    if not segments:
        raise ValueError(
            f"none of the {len(ground_truth)} ground-truth videos has an annotated action that counts under protocol "
            f"{protocol.name!r}; check the annotations, the subset's name and the blocked videos"
        )
    return Truths(
        np.array(videos),
        np.array(labels),
        np.array(segments, dtype=np.float64),
        tuple(video_ids),
        tuple(classes),
        # All records are of one subset: read_ground_truth takes one out of the file.
        ground_truth[0].subset,
        tuple(one.video_id for one in ground_truth if one.video_id not in blocked_ids),
        np.array([_latest_start(one) for one in ground_truth if one.video_id not in blocked_ids]),
        tuple(one.video_id for one in ground_truth if one.video_id in blocked_ids),
        tuple(left_out.elements()),
    )


def _latest_start(record: VideoRecord) -> float:
    # Files without durations: the end of the last action stands in, and predictions behind it are no fault. Those in
    # frames or milliseconds are, which lie many times as far.
    last = max((one.end_seconds for one in record.actions), default=0.0)
    return record.duration_seconds if record.duration_seconds != last else FARTHEST * last or np.inf


def flatten_predictions(
    predictions: Mapping[str, Detections],
    truths: Truths,
    *,
    classes: Sequence[str],
    blocked_videos: Collection[str],
    class_agnostic: bool = False,
) -> Predictions:
    """Every prediction outside `blocked_videos`; `classes` are the names that its labels index.

    `class_agnostic` is a fact for the coverage, and changes nothing.

    Raises ValueError for a label that is no index into `classes` and for NaN or infinite numbers, naming the video.
    """
    video_index = {video_id: index for index, video_id in enumerate(truths.video_ids)}
    class_index = {label: index for index, label in enumerate(truths.classes)}
    # Dtype given: of no classes, NumPy would make floats, which index nothing.
    to_truth_class = np.array([class_index.get(name, -1) for name in classes], dtype=np.int64)
    renamed = match_ids(predictions, [*truths.scored, *truths.blocked])
    # Blocked ids that no record has are left out of the predictions too, else they would count as false.
    left_out = {*blocked_videos, *truths.blocked}
    kept = {renamed.get(video_id, video_id): one for video_id, one in predictions.items()}
    kept = {video_id: one for video_id, one in kept.items() if video_id not in left_out}
    ids = list(kept)
    counts = np.array([len(one) for one in kept.values()], dtype=np.int64)
    videos = np.repeat(np.array([video_index.get(video_id, -1) for video_id in ids], dtype=np.int64), counts)
    place = {video_id: index for index, video_id in enumerate(truths.scored)}
    owners = np.repeat(np.array([place.get(video_id, -1) for video_id in ids], dtype=np.int64), counts)
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
    # Without a class, there is no table to take nothing from.
    to_truth = to_truth_class[labels] if labels.size else labels
    unknown_labels = dict(Counter(classes[label] for label in labels[to_truth < 0].tolist()))
    coverage = _coverage(
        truths,
        per_video=dict(zip(ids, counts.tolist(), strict=True)),
        to_truth=to_truth,
        backwards=segments[:, 1] < segments[:, 0],
        renamed=renamed,
        unknown_labels=unknown_labels,
        num_blocked_ids=len(blocked_videos),
        class_agnostic=class_agnostic,
        num_cut={video_id: one.num_cut for video_id, one in kept.items()},
    )
    found = Predictions(videos, to_truth, segments, scores, owners, coverage)
    return replace(found, coverage=replace(coverage, **_oddities(found, truths)))


def _oddities(found: Predictions, truths: Truths) -> dict[str, Any]:
    """Fields of the coverage that show repeats, constant scores and units other than seconds."""
    known = (found.owners >= 0) & (found.labels >= 0)
    columns = np.column_stack([found.owners, found.labels, found.segments, found.scores])[known]
    # Repeats end up next to each other, whichever column the sort begins with.
    columns = columns[np.lexsort(columns.T)]
    starts, ends = found.segments[found.owners >= 0].T
    lasts = dict(zip(truths.scored, truths.durations.tolist(), strict=True))
    of_truths = np.array([lasts[truths.video_ids[video]] for video in truths.videos])
    return {
        "num_repeated": int((columns[1:] == columns[:-1]).all(axis=1).sum()),
        "num_without_length": int((starts == ends).sum()),
        "num_after_end": int((starts > truths.durations[found.owners[found.owners >= 0]]).sum()),
        "num_truths_after_end": int((truths.segments[:, 0] > of_truths).sum()),
        "last_seconds": (float(ends.max(initial=0.0)), float(truths.segments.max())),
        "is_one_score": len(columns) >= LIKELY_LIMIT and bool((columns[:, -1] == columns[0, -1]).all()),
    }


def _coverage(
    truths: Truths,
    *,
    per_video: Mapping[str, int],
    to_truth: np.ndarray,
    backwards: np.ndarray,
    renamed: Mapping[str, str],
    unknown_labels: Mapping[str, int],
    num_blocked_ids: int,
    class_agnostic: bool,
    num_cut: Mapping[str, int | None],
) -> Coverage:
    """`to_truth` (N,): the true class of each prediction, video by video, or -1. `backwards` (N,): it is reversed."""
    known = to_truth >= 0
    scored = set(truths.scored)
    owners = np.repeat(np.arange(len(per_video)), list(per_video.values()))
    in_subset = np.array([video_id in scored for video_id in per_video], dtype=bool)[owners]
    most = max(per_video.values(), default=0)
    num_reversed = np.bincount(owners[backwards], minlength=len(per_video)).tolist()
    return Coverage(
        subset=truths.subset,
        num_videos=len(truths.scored),
        num_videos_without_actions=len(truths.scored) - len(truths.video_ids),
        class_agnostic=class_agnostic,
        num_blocked_ids=num_blocked_ids,
        blocked_videos=truths.blocked,
        num_predictions=len(known),
        num_in_subset=int(in_subset.sum()),
        num_met=int((in_subset & known).sum()),
        num_predicted_videos=len(scored & per_video.keys()),
        renamed_videos={ours: theirs for ours, theirs in renamed.items() if theirs in scored},
        videos_without_predictions=tuple(video_id for video_id in truths.video_ids if not per_video.get(video_id)),
        unknown_videos={video_id: number for video_id, number in per_video.items() if video_id not in scored},
        unknown_labels=unknown_labels,
        reversed_segments={one: number for one, number in zip(per_video, num_reversed, strict=True) if number},
        known_labels=truths.classes,
        num_left_out=len(truths.left_out),
        labels_left_out=tuple(dict.fromkeys(one for one in truths.left_out if one not in truths.classes)),
        never_predicted=tuple(
            truths.classes[index] for index in np.setdiff1d(np.arange(len(truths.classes)), to_truth)
        ),
        cut_videos={video_id: number for video_id, number in num_cut.items() if number},
        is_limit_known=None not in num_cut.values(),
        most_per_video=most,
        videos_at_most=tuple(video_id for video_id, number in per_video.items() if number == most),
    )


def ranked_by(keys: np.ndarray, scores: np.ndarray, *, num: int) -> list[np.ndarray]:
    """Rows of each of the keys 0 .. `num` - 1, by falling score; equal scores keep their order."""
    # Sorted twice, by the less important key first: the second, stable sort keeps the order of scores within a key.
    by_score = np.argsort(-scores, kind="stable")
    by_key = by_score[np.argsort(keys[by_score], kind="stable")]
    # A key of -1 comes before the first bound, and is cut off.
    bounds = np.searchsorted(keys[by_key], np.arange(num + 1))
    return [by_key[first:end] for first, end in pairwise(bounds)]


def _stack(tensors: list[torch.Tensor], dtype: torch.dtype) -> np.ndarray:
    # Flat, so that the empty tensors of videos without detections join, whatever their shape.
    flat = torch.cat([tensor.detach().to("cpu", dtype).flatten() for tensor in tensors]) if tensors else torch.zeros(0)
    return flat.to(dtype).numpy()


def _owner(wrong: np.ndarray, ids: list[str], counts: np.ndarray) -> str:
    return ids[int(np.searchsorted(np.cumsum(counts), np.flatnonzero(wrong)[0], side="right"))]
