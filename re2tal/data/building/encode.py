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
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.stream import VideoStream

from re2tal.data.building.probe import MAX_MISSING_SHARE, VideoProbe, displayed_size, open_video
from re2tal.data.contract.manifest import Encoding, FramesPerSecond, FramesPerVideo
from re2tal.data.streaming.decode import count_frames, decode_frames

T = TypeVar("T")
MAX_ASPECT = 8
"""Longest side over shortest; past it a picture is no scene, and its scaled width would be without bound."""
MAX_COMPARED = 16
MAX_DIFFERENCE = 1.0
"""Mean levels (of 255) between two decodings of one frame: they differ in how chroma is brought to full size only."""
# FFmpeg pads a row of RGB to 96, 192 or 288 bytes; where that is a multiple of the width, decord takes it for wider
# pixels and gives an error. Found by trying all widths to 130; none above 72 can be concerned.
_REFUSED_WIDTHS = frozenset({2, 4, 6, 8, 12, 16, 24, 48, 72})
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
        frames = nearest_in_time(counted(_timed_frames(container, stream)), rate=rate, num_frames=num_frames)
        pictures = _scaled(frames, stream, short_side=encoding.short_side)
        width, height = _write(target, _naming(source, pictures), rate=rate, encoding=encoding)
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
            # Rates with small terms fit the 32-bit fields of mp4 and H.264; over half an hour the last frame moves by
            # less than 10 ms.
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


def _timed_frames(container: InputContainer, stream: VideoStream) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """All frames with their seconds after the first one."""
    first = previous = None
    for number, frame in enumerate(container.decode(stream)):
        time = frame.dts if frame.pts is None else frame.pts
        if time is None or frame.time_base is None:
            raise ValueError(f"frame {number} has no time stamp; convert the file to mp4")
        if previous is not None and time < previous:
            raise ValueError(f"time runs backwards at frame {number}; convert the file to mp4 at a constant rate")
        first = time if first is None else first
        previous = time
        yield (time - first) * frame.time_base, frame


def _naming(path: Path, pictures: Iterator[T]) -> Iterator[T]:
    """The same pictures; what goes wrong on the way to them becomes a ValueError that names the file."""
    try:
        yield from pictures
    except av.FFmpegError as error:
        raise ValueError(f"{path} is damaged: {error.strerror}; replace the file") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _write(target: Path, pictures: Iterator[av.VideoFrame], *, rate: Fraction, encoding: Encoding) -> tuple[int, int]:
    """Encode pictures of one size at a constant rate; gives their (width, height)."""
    # Without "bitexact" the file would name the library's version.
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    try:
        with av.open(str(target), "w", format="mp4", container_options=options) as container:
            stream = None
            for number, picture in enumerate(pictures):
                stream = stream or _add_stream(container, picture, rate=rate, encoding=encoding)
                picture.pts, picture.time_base = number, 1 / rate
                picture.pict_type = 0  # the source's key frames are not ours
                container.mux(stream.encode(picture))
            if stream is None:
                raise ValueError(f"{target}: there is no picture to write")
            container.mux(stream.encode(None))
            return stream.width, stream.height
    except av.FFmpegError as error:
        raise OSError(f"{target} cannot be written: {error.strerror}; is the disk full?") from None


def _add_stream(
    container: OutputContainer, picture: av.VideoFrame, *, rate: Fraction, encoding: Encoding
) -> VideoStream:
    # cpu-independent: without it x264's vector code reads memory that nobody wrote, and 60 encodings of one video gave
    # a dozen different files. With more than one thread the bits would depend on the machine's number of cores.
    x264 = f"keyint={encoding.gop}:min-keyint={encoding.gop}:scenecut=0:open-gop=0:threads=1:cpu-independent=1"
    options = {"preset": encoding.preset, "tune": "fastdecode", "crf": str(encoding.crf), "x264-params": x264}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
    stream.codec_context.time_base = 1 / rate
    return stream


def _scaled(frames: Iterator[av.VideoFrame], source: VideoStream, *, short_side: int) -> Iterator[av.VideoFrame]:
    """Frames as upright yuv420p pictures of one size, also where the source changes its size on the way."""
    size = None
    graphs: dict[tuple, av.filter.Graph] = {}
    for frame in frames:
        size = size or stored_size(displayed_size(frame, source), short_side=short_side)
        kind = (frame.width, frame.height, frame.format.name, frame.rotation)
        if kind not in graphs:
            graphs[kind] = _scaling_graph(frame, size)
        graphs[kind].vpush(frame)
        yield graphs[kind].vpull()


def _scaling_graph(frame: av.VideoFrame, size: tuple[int, int]) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    turn = _TURNS.get(frame.rotation % 360)
    graph.link_nodes(
        source,
        *([graph.add(*turn)] if turn else []),
        graph.add("scale", f"{size[0]}:{size[1]}:flags=bicubic+accurate_rnd+bitexact"),
        graph.add("setsar", "1"),
        graph.add("format", "yuv420p"),
        graph.add("buffersink"),
    ).configure()
    return graph


def stored_size(displayed: tuple[int, int], *, short_side: int) -> tuple[int, int]:
    """(width, height), both even, with a shorter side of `short_side` or of what the source has, if that is less."""
    width, height = displayed
    if max(displayed) > MAX_ASPECT * min(displayed):
        raise ValueError(f"its picture of {width}x{height} is longer than {MAX_ASPECT} times its short side; crop it")
    scale = min(Fraction(1), Fraction(short_side, min(displayed)))
    width, height = max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))
    while width in _REFUSED_WIDTHS:
        width += 2
    return width, height


def check_normalised(path: Path, expected: Normalised) -> None:
    """Prove that decord gives the right frames of a normalised file; may hang on one that is not, so call it isolated.

    Compared are the number of frames, the time of each, and the pictures of a sparse batch with what FFmpeg gives when
    it decodes the file from the start.
    """
    _check_times(path, expected)
    video = path.read_bytes()
    if (seen := count_frames(video)) != expected.num_frames:
        raise ValueError(f"{path}: decord sees {seen} frames of {expected.num_frames} that were encoded")
    asked = np.unique(np.linspace(0, expected.num_frames - 1, num=MAX_COMPARED).round().astype(int))
    by_number = decode_frames(video, asked).numpy()
    in_order = _decode_in_order(path, set(asked.tolist()))
    for index, picture in zip(asked.tolist(), by_number, strict=True):
        difference = np.abs(picture.astype(np.int16) - in_order[index]).mean()
        if difference > MAX_DIFFERENCE:
            raise ValueError(f"{path}: decord gives another frame {index} (mean difference {difference:.1f} levels)")


def _check_times(path: Path, expected: Normalised) -> None:
    with open_video(path) as (container, stream):
        shown = [(p.pts, p.time_base, p.is_discard) for p in container.demux(stream) if p.size]
    times = sorted(float(pts * base) for pts, base, _ in shown if pts is not None)
    if any(hidden for _, _, hidden in shown) or len(times) != expected.num_frames:
        raise ValueError(f"{path}: {len(times)} frames stored, {expected.num_frames} encoded")
    off = np.abs(np.array(times) - np.arange(len(times)) / expected.fps).max()
    if off > 0.001:
        raise ValueError(f"{path}: a stored frame is {off:.4f} s away from its time")


def _decode_in_order(path: Path, wanted: set[int]) -> dict[int, np.ndarray]:
    with open_video(path) as (container, stream):
        return {
            number: frame.to_ndarray(format="rgb24")
            for number, frame in enumerate(container.decode(stream))
            if number in wanted
        }
