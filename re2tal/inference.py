"""Clips in, detections per video out: forward, decode, merge the windows of each video, suppress. Or its class.

    rank: batches -> {(video, window): Detections} -> the rank of the video: merged, suppressed, best first -> all ranks

Nothing in the loop waits for another rank except the forward itself (under ZeRO-3 it is a collective, and streams have
the same number of batches on every rank). What a window found is keyed by (video, window), never by position, so
neither the number of ranks nor a clip that was seen twice changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from re2tal.data.streaming.transforms import normalise
from re2tal.distributed import exchange_objects, gather_objects, together
from re2tal.evaluation.suppression import SuppressionConfig, suppress
from re2tal.structures import Batch, ClipBatch, Detections, FeatureBatch

Found = TypeVar("Found")
Whole = TypeVar("Whole")

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
    return finish_videos(windows, partial(merge_windows, suppression=suppression))


def classify(recognizer: nn.Module, batches: Iterable[Batch], *, device: torch.device | str) -> dict[str, Tensor]:
    """As `predict`, with a `Recognizer`: the probabilities of all classes (K,) by video id, the mean over its views.

    Raises ValueError, naming the video, for probabilities that are not finite.
    """
    windows = look_at_windows(
        recognizer, batches, lambda inner, outputs, batch: list(outputs.logits.softmax(1).cpu()), device=device
    )
    means = finish_videos(windows, _mean_of_views)
    for video_id, mean in means.items():
        if not bool(mean.isfinite().all()):
            raise ValueError(f"video {video_id!r}: its probabilities are not finite: {mean.tolist()[:5]}")
    return means


def finish_videos(
    windows: dict[tuple[str, int], Found], finish: Callable[[dict[tuple[str, int], Found]], dict[str, Whole]]
) -> dict[str, Whole]:
    """Every rank calls this: what `finish` makes of the windows of all ranks, by video id, sorted, on every rank.

    The windows of a video come together on one rank, which alone holds and finishes them; a clip that two ranks saw is
    there once. An error of `finish` on one rank is an error on all.
    """
    ranks = range(len(gather_objects(None)))
    # Any rank can tell without asking. Not hash(), which differs between processes.
    owner = {video_id: crc32(video_id.encode()) % len(ranks) for video_id, _ in windows}
    parts = [{key: one for key, one in windows.items() if owner[key[0]] == rank} for rank in ranks]
    mine = {key: one for part in exchange_objects(parts) for key, one in part.items()}
    finished = together(lambda: finish(mine))
    return dict(sorted((item for of_rank in finished for item in of_rank.items()), key=itemgetter(0)))


def _mean_of_views(windows: dict[tuple[str, int], Tensor]) -> dict[str, Tensor]:
    views: dict[str, list[Tensor]] = {}
    # Sorted, because a sum of floats depends on its order, and windows come from any rank.
    for (video_id, _), probabilities in sorted(windows.items(), key=itemgetter(0)):
        views.setdefault(video_id, []).append(probabilities)
    return {video_id: torch.stack(of_video).mean(dim=0) for video_id, of_video in views.items()}


def detect_windows(detector: nn.Module, batches: Iterable[Batch], *, device: torch.device | str) -> Windows:
    """This rank's share: what each valid clip of `batches` shows, before merging."""

    def detect(inner: Any, outputs: Any, batch: Batch) -> list[Detections]:
        found = inner.detect(outputs, batch.timelines, num_frames=batch.mask.shape[1])
        return [_to_cpu(one) for one in found]

    return look_at_windows(detector, batches, detect, device=device)


def look_at_windows(
    model: nn.Module,
    batches: Iterable[Batch],
    read: Callable[[Any, Any, Batch], list[Found]],
    *,
    device: torch.device | str,
) -> dict[tuple[str, int], Found]:
    """The result of `read(network, its outputs in float32, batch)` for each valid clip, by (video id, window id)."""
    inner: Any = getattr(model, "module", model)
    weights = next(inner.parameters())
    windows: dict[tuple[str, int], Found] = {}
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: weights that ZeRO-3 gathers in it could not take part in training afterwards.
        with torch.no_grad():
            for batch in batches:
                here = batch.to(device)
                outputs = model(detector_input(here, dtype=weights.dtype), here.mask)
                outputs = tree_map(lambda one: one.float() if one.is_floating_point() else one, outputs)
                found = read(inner, outputs, batch)
                keys = zip(batch.video_ids, batch.window_ids, batch.valid.tolist(), found, strict=True)
                windows |= {(video, window): one for video, window, valid, one in keys if valid}
    finally:
        model.train(was_training)
    return windows


def average_flips(detector: nn.Module) -> None:
    """From now on the outputs of `detector`, logits and offsets, are means over each clip and its mirror image.

    For frames (B, 3, T, H, W) with two spatial axes; features have no mirror image.
    """
    plain = detector.forward

    def both(frames: Tensor, frame_mask: Tensor) -> Any:
        return tree_map(_mean, plain(frames, frame_mask), plain(frames.flip(-1), frame_mask))

    detector.forward = both


def _mean(one: Tensor, mirrored: Tensor) -> Tensor:
    return (one + mirrored) / 2 if one.is_floating_point() else one


def detector_input(batch: Batch, *, dtype: torch.dtype) -> Tensor:
    """Input of a detector in its weights' type: normalised frames (B, 3, T, H, W), or features (B, C, T)."""
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
