"""Video files as people have them: other rates, codecs, edits, and damage. Frame k shows the number k."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from data.numbered import HEIGHT, WIDTH, numbered_frame

from re2tal.data.contract.manifest import Encoding, FramesPerSecond, FramesPerVideo


def encoding(*, fps: float | None = None, num_frames: int | None = None, short_side: int = 96) -> Encoding:
    return Encoding(FramesPerSecond(fps or 30.0) if num_frames is None else FramesPerVideo(num_frames), short_side)


def write_video(
    path: Path,
    *,
    num_frames: int = 60,
    rate: Fraction | int = 30,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    milliseconds: Sequence[int] | None = None,
    start: int = 0,
    rotation: int = 0,
    sample_aspect: Fraction | None = None,
    sound: bool = False,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Frames shown at a rate, from tick `start` on, or at given milliseconds."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        if sample_aspect:
            stream.codec_context.sample_aspect_ratio = sample_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        tick = Fraction(1, 1000) if milliseconds else 1 / Fraction(rate)
        stream.codec_context.time_base = tick
        audio = container.add_stream("aac", rate=16000) if sound else None
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.pts = start + (milliseconds[number] if milliseconds else number)
            frame.time_base = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio:
            _write_silence(container, audio)
    return path


def write_sound(path: Path) -> Path:
    """An mp4 without a picture."""
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=16000))
    return path


def cut_without_decoding(source: Path, target: Path, *, start_seconds: int) -> Path:
    """What `-ss SECONDS -c copy` does: packets before the cut stay, and an edit list hides them."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        shift = int(start_seconds / stream.time_base)
        for packet in read.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                written.mux(packet)
    return target


def cut_short(source: Path, target: Path, *, share: float) -> Path:
    """A download that stopped."""
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


def flip_bytes(source: Path, target: Path) -> Path:
    """A disk gone bad in the middle of the pictures."""
    content = bytearray(source.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 2000, 37):
        content[place] ^= 0x55
    target.write_bytes(content)
    return target


def _write_silence(container: av.container.OutputContainer, stream: av.AudioStream) -> None:
    for number in range(30):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, number * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
