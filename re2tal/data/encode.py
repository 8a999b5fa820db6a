"""Normalise a video: any sound file in, one that decord decodes exactly out.

    output frame i  =  the source frame nearest to i / fps seconds after the first one

H.264 with closed groups of pictures, constant rate, square upright pixels, no sound, no edit of the source left in the
timing. On other files decord 0.6 returns wrong frames without a word, or never returns (open groups, edit lists,
transport streams, mpeg-4 with B-frames), so this is what makes training data trustworthy, not a matter of size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
import av.filter
from av.container import InputContainer, OutputContainer
from av.video.stream import VideoStream

from re2tal.data.manifest import Encoding, FramesPerSecond, FramesPerVideo
from re2tal.data.probe import MAX_MISSING_SHARE, VideoProbe, displayed_size, open_video

T = TypeVar("T")
MAX_ASPECT = 8
"""Longest side over shortest; past it a picture is no scene, and its scaled width would be without bound."""
# Turns a frame by its rotation, degrees anticlockwise.
_TURNS = {90: ("transpose", "cclock"), 180: ("rotate", "PI"), 270: ("transpose", "clock")}


@dataclass(frozen=True, slots=True)
class Normalised:
    """What a normalised file holds."""

    num_frames: int
    fps: float
    width: int
    height: int


def normalise_video(source: Path, target: Path, *, probe: VideoProbe, encoding: Encoding) -> Normalised:
    """Write `source` to `target` as an mp4 in the given encoding; the same bytes for the same input and libraries.

    Raises ValueError where the source is damaged: frames that do not decode, or time stamps that run backwards.
    """
    rate, num_frames = sampling_grid(probe.duration_seconds, encoding)
    decoded = 0

    def counted(frames: Iterator[T]) -> Iterator[T]:
        nonlocal decoded
        for frame in frames:
            decoded += 1
            yield frame

    with open_video(source) as (container, stream):
        frames = nearest_in_time(counted(_timed_frames(source, container, stream)), rate=rate, num_frames=num_frames)
        width, height = _write(target, frames, source=stream, rate=rate, encoding=encoding)
    if decoded < probe.num_frames * (1 - MAX_MISSING_SHARE):
        raise ValueError(f"{source} is damaged: {decoded} of its {probe.num_frames} frames decode; replace the file")
    return Normalised(num_frames=num_frames, fps=float(rate), width=width, height=height)


def sampling_grid(duration_seconds: Fraction, encoding: Encoding) -> tuple[Fraction, int]:
    """(frames per second, number of frames) to store of a video of this duration."""
    match encoding.sampling:
        case FramesPerSecond(fps):
            rate = Fraction(fps).limit_denominator(1001)
            return rate, max(1, round(duration_seconds * rate))
        case FramesPerVideo(num_frames):
            # Rates with small terms fit the 32-bit fields of mp4 and H.264; the last frame moves by less than 1 ms
            # per half an hour.
            return (num_frames / duration_seconds).limit_denominator(100_000), num_frames


def nearest_in_time(timed: Iterator[tuple[Fraction, T]], *, rate: Fraction, num_frames: int) -> Iterator[T]:
    """For i = 0 ... num_frames - 1 the item whose time is nearest to i / rate; of two as near, the earlier.

    `timed` are (seconds, item) in order of time. Nothing is yielded where there is no item.
    """
    wanted = 0
    previous: tuple[Fraction, T] | None = None
    for time, item in timed:
        if previous is not None:
            while wanted < num_frames and wanted / rate <= (previous[0] + time) / 2:
                yield previous[1]
                wanted += 1
        previous = time, item
    if previous is not None:
        for _ in range(wanted, num_frames):
            yield previous[1]


def _timed_frames(
    path: Path, container: InputContainer, stream: VideoStream
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """All frames with their seconds after the first one."""
    first = previous = None
    for number, frame in enumerate(container.decode(stream)):
        time = frame.dts if frame.pts is None else frame.pts
        if time is None or frame.time_base is None:
            raise ValueError(f"{path}: frame {number} has no time stamp; convert it to mp4")
        if previous is not None and time < previous:
            raise ValueError(f"{path}: time runs backwards at frame {number}; convert it to mp4 at a constant rate")
        first = time if first is None else first
        previous = time
        yield (time - first) * frame.time_base, frame


def _write(
    target: Path, frames: Iterator[av.VideoFrame], *, source: VideoStream, rate: Fraction, encoding: Encoding
) -> tuple[int, int]:
    """Encode frames at a constant rate; gives the stored (width, height)."""
    # Without "bitexact" the file would name the library's version, and with more than one thread its bits may depend on
    # the machine.
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(target), "w", format="mp4", container_options=options) as container:
        scaler, stream = None, None
        for number, frame in enumerate(frames):
            if scaler is None or stream is None:
                size = stored_size(displayed_size(frame, source), short_side=encoding.short_side)
                scaler, stream = _Scaler(size), _add_stream(container, size, rate=rate, encoding=encoding)
            picture = scaler(frame)
            picture.pts, picture.time_base = number, 1 / rate
            picture.pict_type = 0  # the source's key frames are not ours
            container.mux(stream.encode(picture))
        if scaler is None or stream is None:
            raise ValueError("none of its frames can be decoded; replace the file")
        container.mux(stream.encode(None))
    return scaler.size


def stored_size(displayed: tuple[int, int], *, short_side: int) -> tuple[int, int]:
    """(width, height) after scaling the shorter side to `short_side`, both even."""
    width, height = displayed
    if max(displayed) > MAX_ASPECT * min(displayed):
        raise ValueError(f"its picture of {width}x{height} is longer than {MAX_ASPECT} times its short side; crop it")
    scale = Fraction(short_side, min(displayed))
    return 2 * round(width * scale / 2), 2 * round(height * scale / 2)


def _add_stream(
    container: OutputContainer, size: tuple[int, int], *, rate: Fraction, encoding: Encoding
) -> VideoStream:
    closed_groups = f"keyint={encoding.gop}:min-keyint={encoding.gop}:scenecut=0:open-gop=0:threads=1"
    stream = container.add_stream(
        "libx264",
        rate=rate,
        options={
            "preset": encoding.preset,
            "tune": "fastdecode",
            "crf": str(encoding.crf),
            "x264-params": closed_groups,
        },
    )
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = 1 / rate
    return stream


class _Scaler:
    """Turns, scales and converts frames to upright yuv420p of one size, also where they change size on the way."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._graphs: dict[tuple, av.filter.Graph] = {}

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        kind = (frame.width, frame.height, frame.format.name, frame.rotation % 360)
        if kind not in self._graphs:
            self._graphs[kind] = self._graph(frame)
        graph = self._graphs[kind]
        graph.vpush(frame)
        return graph.vpull()

    def _graph(self, frame: av.VideoFrame) -> av.filter.Graph:
        width, height = self.size
        graph = av.filter.Graph()
        graph.threads = 1
        nodes = [
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
        ]
        if turn := _TURNS.get(frame.rotation % 360):
            nodes.append(graph.add(*turn))
        nodes.append(graph.add("scale", f"{width}:{height}:flags=bicubic"))
        nodes += [graph.add("setsar", "1"), graph.add("format", "yuv420p"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph
