"""Measures the seconds of each rewired stage with each setting, on the device that will train.

The backbone runs alone, with random weights, on the clips of the run, or on shorter ones where those do not fit; times
are then scaled by the number of frames. Settings take turns, and the median counts: a machine that is busy for a while
slows all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from re2tal.backbones import build_backbone
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.config import AnyRun
from re2tal.planning.dry_run import Event, marking
from re2tal.planning.settings import Setting, configure
from re2tal.rewire import stages_of
from re2tal.training.config import DTYPES

ROUNDS = 3
LINK_BYTES = 64 * 2**20
"""Copied to the host and back to time the link."""
MOST_SECONDS = 15.0
"""No round starts later."""
MOST_BYTES_ON_A_CPU = 512 * 2**20
"""A clip that keeps more is shortened on a CPU, where time, not memory, is the limit."""
FEWEST_FRAMES = 16


def measured_seconds(
    run: AnyRun,
    settings: Sequence[Setting],
    *,
    device: torch.device,
    plain_bytes: int,
    inside_bytes: int,
    order: Sequence[str],
) -> list[list[float]]:
    """Seconds of forward and backward, by setting and by stage, for the clips of `run`.

    The device is left empty, and its count of the most that was allocated begins anew.

    `plain_bytes`: what a step on these clips needs when everything is kept; `inside_bytes`: what one branch needs at
    the most, run whole; `order`: names of the stages as they run. The caller's random generators stay as they are.
    """
    devices = [] if device.type == "cpu" else [device]
    # On a CPU no device's generator is saved; device_type then only has to be one that PyTorch knows.
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        # Without weights: seconds do not depend on the numbers, and a file of them need not be read twice.
        backbone = build_backbone(replace(run.backbone, weights=None)).to(device, DTYPES[run.engine.precision])
        frames, share = _clip(run, backbone, device, plain_bytes)
        # Whole branches where a piece would exceed a branch by a margin: sizes of blocks are estimates.
        alike = [
            replace(one, chunk_mebibytes=None) if (one.chunk_mebibytes or 0) * 2**20 > 2 * inside_bytes * share else one
            for one in settings
        ]
        # Settings that run the same way are timed once; in their order, so that every start of a run times in the same
        # one.
        different = list(dict.fromkeys(alike))
        for setting in different if device.type != "cpu" else ():
            _seconds(backbone, setting, frames, order)  # libraries find their kernels
        rounds: list[dict[Setting, list[float]]] = []
        # One round at least, however long it takes.
        enough = time.perf_counter() + MOST_SECONDS
        while not rounds or (len(rounds) < ROUNDS and time.perf_counter() < enough):
            rounds.append({setting: _seconds(backbone, setting, frames, order) for setting in different})
        # Before the cache is emptied, which frees only what nobody holds.
        del backbone, frames
    if devices:
        torch.get_device_module(device).empty_cache()
        torch.get_device_module(device).reset_peak_memory_stats(device)
    return [
        [statistics.median(times) / share for times in zip(*(one[setting] for one in rounds), strict=True)]
        for setting in alike
    ]


def link_bytes_per_second(device: torch.device) -> float | None:
    """Bytes per second to pinned host memory and back, the slower of the two; None on a CPU.

    The best of a few copies counts, so that a short disturbance does not.
    """
    if device.type == "cpu":
        return None
    # Pinned memory below: copies from and to other pages go through a buffer, and are slower than offloading is.
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    here = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    synchronize = torch.get_device_module(device).synchronize

    def seconds(to: Tensor, of: Tensor) -> float:
        synchronize()
        begin = time.perf_counter()
        to.copy_(of, non_blocking=True)
        synchronize()
        return time.perf_counter() - begin

    return LINK_BYTES / max(min(seconds(*way) for _ in range(5)) for way in ((here, there), (there, here)))


def _clip(run: AnyRun, backbone: nn.Module, device: torch.device, plain_bytes: int) -> tuple[Tensor, float]:
    """Frames that fit when everything is kept, and their share of the run's."""
    if device.type == "cpu":
        room = MOST_BYTES_ON_A_CPU
    else:
        # Estimates of what a step needs may be too low; the rest is left for that.
        room = int(torch.get_device_module(device).mem_get_info(device)[0] * 0.8)
    batch, whole = run.engine.batch_size, run.data.clips.windowing.num_frames
    unit = backbone.encoder.clip_frames if isinstance(backbone, ClipwiseBackbone) else FEWEST_FRAMES
    clips, num_frames = batch, whole
    # Fewer clips first, then shorter ones: a stage's time per frame changes least with the number of clips.
    while plain_bytes * clips * num_frames > room * batch * whole and (clips > 1 or num_frames >= 2 * unit):
        clips, num_frames = (clips // 2, num_frames) if clips > 1 else (clips, num_frames // 2 // unit * unit)
    size = run.data.clips.size
    frames = torch.randn(clips, 3, num_frames, size, size, device=device, dtype=DTYPES[run.engine.precision])
    return frames, clips * num_frames / (batch * whole)


def _seconds(backbone: nn.Module, setting: Setting, frames: Tensor, order: Sequence[str]) -> list[float]:
    """Seconds of one step, by stage."""
    found = stages_of(backbone)
    stages = {name: found[name] for name in order}
    configure(stages, [setting] * len(stages))
    synchronize = torch.get_device_module(frames.device).synchronize if frames.device.type != "cpu" else lambda: None
    events: list[tuple[Event, float]] = []

    def mark(event: Event) -> None:
        synchronize()
        events.append((event, time.perf_counter()))

    mask = torch.ones(len(frames), frames.shape[2], dtype=torch.bool, device=frames.device)
    with marking(backbone, list(stages.values()), mark):
        backbone(frames, mask).values.float().square().mean().backward()
        # Ends the backward of the first stage, which nothing follows.
        mark(Event("start", 0))
    for parameter in backbone.parameters():
        parameter.grad = None
    seconds = [0.0] * len(stages)
    for (event, begin), (_, end) in pairwise(events):
        # What lies between is the head's, which no setting changes.
        if event.kind in ("forward", "backward"):
            seconds[event.stage] += end - begin
    return seconds
