"""What is wrong with a video file, before it is packed: the same reading as a build does, without encoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from re2tal.data.building.probe import open_video, probe_video
from re2tal.data.building.shown import Damage, shown_frames

_OFF_STEP = 0.25
"""A step between frames is odd if it differs from the usual one by this share: containers round to milliseconds."""


@dataclass(frozen=True, slots=True)
class Examined:
    """A video file that can be read."""

    codec: str
    width: int
    height: int
    num_frames: int
    seconds: float
    has_variable_rate: bool
    num_keyframes: int
    damage: Damage
    """Without decoding: missing frames only."""

    @property
    def fps(self) -> float:
        """On average."""
        return self.num_frames / self.seconds


def examine_video(path: Path, *, decode: bool) -> Examined:
    """Read all packets, and with `decode` all frames. ValueError says why a file cannot be used at all."""
    probe = probe_video(path, max_missing=1.0)
    damage = probe.damage
    with open_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        times = np.sort([packet.pts for packet in packets if packet.pts is not None])
        num_keyframes = sum(packet.is_keyframe for packet in packets)
    if decode:
        with open_video(path) as (container, stream):
            for _ in shown_frames(container, stream, damage):
                pass
    else:
        damage.num_frames += probe.num_frames
    steps = np.diff(times)
    usual = float(np.median(steps)) if len(steps) else 0.0
    return Examined(
        codec=probe.codec,
        width=probe.width,
        height=probe.height,
        num_frames=probe.num_frames,
        seconds=float(probe.duration_seconds),
        # More than one step in a hundred: a camera drops a frame now and then.
        has_variable_rate=bool(np.mean(np.abs(steps - usual) > _OFF_STEP * usual) > 0.01) if len(steps) else False,
        num_keyframes=num_keyframes,
        damage=damage,
    )
