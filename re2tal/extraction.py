"""Features of whole videos: a backbone, window by window, and one grid of steps per video out of what it gave.

    windows   |--------|            each begins with a step of the video's grid; the last one reaches the video's end
                  |--------|
                      |--------|
    features  aaaaaabbbbcccccccc    every step is taken from the window in which it lies farthest from both borders

At its borders a window lacks half of what a network looks at; overlapping windows keep these steps out, except at the
two ends of the video. A window that reaches past the end repeats the last frame, as in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from re2tal.backbones import VideoBackbone
from re2tal.data.building.build_features import Computed
from re2tal.data.contract.shards import ShardSet
from re2tal.data.streaming.decode import DecoderName
from re2tal.data.streaming.stream import ClipConfig, ClipStream, stream_clips
from re2tal.data.streaming.transforms import normalise
from re2tal.data.streaming.windows import cover_windows
from re2tal.structures import ClipBatch, VideoRecord


class WindowFeatures(NamedTuple):
    """Features of one window of a video."""

    start_step: int
    """On the video's grid."""
    values: Tensor
    """(C, T')"""


@dataclass(frozen=True)
class Extractor:
    """A backbone, on its device and in the type it computes in, and what it is shown."""

    backbone: VideoBackbone
    clips: ClipConfig
    batch_size: int
    """Windows in one forward. It changes the speed, and features by rounding only."""
    decoder: DecoderName = "decord"

    def run(self, shards: ShardSet, records: Sequence[VideoRecord]) -> Iterator[Computed | str]:
        """The features of `records`, videos of `shards`, in their order; where a video cannot be read, why.

        Raises ValueError where windows do not hold whole steps, or ask for a higher rate than that of the shards.
        """
        wanted = shards.only(record.video_id for record in records)
        frames_per_step = self.backbone.frames_per_step
        plan = partial(cover_windows, windowing=self.clips.windowing, frames_per_step=frames_per_step)
        # One video that cannot be read is told of, and does not end the extraction.
        clips = replace(self.clips, allow_missing=True)
        stream = stream_clips(
            wanted, clips, batch_size=self.batch_size, training=False, plan=plan, decoder=self.decoder
        )
        with closing(self._windows(stream)) as windows:
            for video in wanted.videos:
                planned = plan(video)
                # Taken even where the video failed: the stream gives a window for every one that was planned.
                values = [next(windows) for _ in planned]
                if (failure := stream.failures.get(video.record.video_id)) is not None:
                    yield failure.reason
                    continue
                seconds_per_step = planned[0].timeline.seconds_per_step * frames_per_step
                starts = [round(window.timeline.start_seconds / seconds_per_step) for window in planned]
                num_steps = starts[-1] + -(-planned[-1].num_valid // frames_per_step)
                parts = [WindowFeatures(*part) for part in zip(starts, values, strict=True)]
                yield Computed(stitch(parts, num_steps=num_steps), seconds_per_step)

    @torch.no_grad()
    def _windows(self, stream: ClipStream) -> Generator[Tensor]:
        """(C, T') float32 on the CPU for each window of the stream, in order."""
        weights = next(self.backbone.parameters())
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            for batch in stream.epoch(0):
                assert isinstance(batch, ClipBatch)
                here = batch.to(weights.device)
                features = self.backbone(normalise(here.frames, dtype=weights.dtype), here.frame_mask)
                yield from features.values.float().cpu()
        finally:
            self.backbone.train(was_training)


def stitch(parts: Sequence[WindowFeatures], *, num_steps: int) -> Tensor:
    """Windows that cover a video's first `num_steps` steps -> (C, num_steps), each from where it is most inside."""
    steps = np.arange(num_steps)
    inside = np.stack(
        [np.minimum(steps - start, start + values.shape[1] - 1 - steps) for start, values in parts]
    )  # steps to the nearer border; negative outside
    choice = inside.argmax(axis=0)  # the first of several
    assert (inside.max(axis=0) >= 0).all()
    return torch.stack(
        [parts[part].values[:, step - parts[part].start_step] for step, part in enumerate(choice)], dim=1
    )


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of a module's weights and buffers, by name: what it computes, wherever the numbers came from."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # The bytes as they are: bfloat16 has no type in NumPy.
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
