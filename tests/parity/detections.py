"""Compares lists of detections whose order is only as certain as their scores are distinct."""

from __future__ import annotations

import numpy as np
import torch

from re2tal.structures import Detections


def stored(arrays: dict[str, np.ndarray], prefix: str, clip: int) -> Detections:
    """The reference detections `{prefix}_segments_{clip}`, `..._scores_...`, `..._labels_...`."""
    segments, scores, labels = (arrays[f"{prefix}_{part}_{clip}"] for part in ("segments", "scores", "labels"))
    return Detections(torch.from_numpy(segments), torch.from_numpy(scores), torch.from_numpy(labels).long())


def from_results(results: list[dict], classes: list[str]) -> Detections:
    """The detections of one video as a results file lists them."""
    return Detections(
        torch.tensor([entry["segment"] for entry in results]).reshape(-1, 2),
        torch.tensor([entry["score"] for entry in results]),
        torch.tensor([classes.index(entry["label"]) for entry in results], dtype=torch.int64),
    )


def rounded(detections: Detections) -> Detections:
    """To 2 decimals of a second and 4 of a score, as a results file holds them."""
    segments = [[round(time, 2) for time in segment] for segment in detections.segments.tolist()]
    scores = [round(score, 4) for score in detections.scores.tolist()]
    return Detections(torch.tensor(segments), torch.tensor(scores), detections.labels)


def check_identical(ours: Detections, reference: Detections, *, score: float = 1e-5, segment: float = 0.0) -> None:
    """Rank by rank: scores to `score` relative, segments to `segment`, labels exactly."""
    assert len(ours) == len(reference)
    torch.testing.assert_close(ours.scores, reference.scores, rtol=score, atol=0)
    torch.testing.assert_close(ours.segments, reference.segments, rtol=0, atol=segment)
    assert ours.labels.tolist() == reference.labels.tolist()


def check_same(
    ours: Detections, reference: Detections, *, score: float = 1e-4, segment: float = 1e-3, unsure: int = 0
) -> None:
    """Best first, every score to `score`; segments to `segment` and labels equal up to swaps among close scores.

    Where the cap on their number cuts between close scores, the last ones may differ. `unsure` others may as well: of
    two that overlap and score alike, the last bits say which one suppresses the other.
    """
    assert len(ours) == len(reference)
    np.testing.assert_allclose(_descending(ours), _descending(reference), rtol=0, atol=score)
    last = float(reference.scores.min()) if len(reference) else 0.0
    sure = reference.scores > last + 2 * score
    close = (ours.scores[None] - reference.scores[:, None]).abs() <= score
    close &= (ours.segments[None] - reference.segments[:, None]).abs().amax(dim=-1) <= segment
    close &= ours.labels[None] == reference.labels[:, None]
    found = close.any(dim=1)
    lost = (sure & ~found).nonzero()[:, 0].tolist()
    assert len(lost) <= unsure, f"{len(lost)} of {len(reference)} detections not found, first at rank {lost[0]}"


def _descending(detections: Detections) -> np.ndarray:
    return np.sort(detections.scores.numpy())[::-1]
