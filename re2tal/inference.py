"""Clips in, detections per video out: forward, decode, merge the windows of each video, suppress.

    rank: batches -> {(video, window): Detections} --gather once--> all ranks: merged by video -> suppressed, best first

Nothing in the loop waits for another rank except the forward itself (under ZeRO-3 it is a collective, and streams have
the same number of batches on every rank). What a window found is keyed by (video, window), never by position, so
neither the number of ranks nor a clip that was seen twice changes the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from re2tal.data.transforms import normalise
from re2tal.distributed import gather_objects
from re2tal.evaluation.suppression import SuppressionConfig, suppress
from re2tal.structures import Batch, ClipBatch, Detections, FeatureBatch

Windows = dict[tuple[str, int], Detections]
"""Detections of one clip, on the CPU and not suppressed, by (video id, window id)."""


def predict(
    detector: nn.Module, batches: Iterable[Batch], *, suppression: SuppressionConfig, device: torch.device | str
) -> dict[str, Detections]:
    """Every rank calls this, with equally many batches; every rank gets the detections of all videos, by id, sorted.

    `detector` is a `TemporalActionDetector`, or an engine or wrapper whose `module` is one; it lies on `device`. It is
    put in evaluation mode, and left in the mode it came in. Clips that are not `valid` are passed through the network,
    for the other ranks' sake, and forgotten. A video none of whose clips was valid is not in the result.

    Raises ValueError, naming the video, for detections that are not finite.
    """
    windows = detect_windows(detector, batches, device=device)
    gathered: Windows = {}
    for of_rank in gather_objects(windows):
        gathered |= of_rank
    return merge_windows(gathered, suppression=suppression)


def detect_windows(detector: nn.Module, batches: Iterable[Batch], *, device: torch.device | str) -> Windows:
    """This rank's share: what each valid clip of `batches` shows, before merging."""
    inner: Any = getattr(detector, "module", detector)
    weights = next(inner.parameters())
    windows: Windows = {}
    was_training = detector.training
    detector.eval()
    try:
        # Not inference_mode: weights that ZeRO-3 gathers in it could not take part in training afterwards.
        with torch.no_grad():
            for batch in batches:
                here = batch.to(device)
                outputs = detector(detector_input(here, dtype=weights.dtype), here.mask)
                outputs = tree_map(lambda one: one.float() if one.is_floating_point() else one, outputs)
                found = inner.detect(outputs, batch.timelines, num_frames=batch.mask.shape[1])
                keys = zip(batch.video_ids, batch.window_ids, batch.valid.tolist(), found, strict=True)
                windows |= {(video, window): _to_cpu(one) for video, window, valid, one in keys if valid}
    finally:
        detector.train(was_training)
    return windows


def detector_input(batch: Batch, *, dtype: torch.dtype) -> Tensor:
    """What a detector takes, in its weights' type: normalised frames (B, 3, T, H, W), or features (B, C, T)."""
    match batch:
        case ClipBatch():
            return normalise(batch.frames, dtype=dtype)
        case FeatureBatch():
            return batch.features.to(dtype)


def merge_windows(
    windows: Mapping[tuple[str, int], Detections], *, suppression: SuppressionConfig
) -> dict[str, Detections]:
    """All detections of a video's windows together, suppressed as one; videos sorted by id, windows by number."""
    by_video: dict[str, list[Detections]] = {}
    for video_id, window_id in sorted(windows):
        by_video.setdefault(video_id, []).append(windows[video_id, window_id])
    merged = {}
    for video_id, parts in by_video.items():
        try:
            merged[video_id] = suppress(concatenate(parts), suppression)
        except ValueError as error:
            raise ValueError(f"video {video_id!r}: {error}") from error
    return merged


def concatenate(parts: Iterable[Detections]) -> Detections:
    """Detections of several clips of one video, as they come."""
    columns = zip(*((one.segments, one.scores, one.labels) for one in parts), strict=True)
    return Detections(*(torch.cat(column) for column in columns))


def _to_cpu(detections: Detections) -> Detections:
    return Detections(detections.segments.cpu(), detections.scores.cpu(), detections.labels.cpu())
