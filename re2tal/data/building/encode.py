"""Normalise a video: any sound file in, one that decord decodes exactly out.

    output frame i  =  the source frame nearest to i / fps seconds on a player's clock

H.264 with closed groups of pictures, constant rate, square upright pixels, no sound, no edit of the source left in the
timing. On other files decord 0.6 returns wrong frames without a word, or never returns (open groups, edit lists,
transport streams, mpeg-4 with B-frames), so this is what makes training data trustworthy, not a matter of size.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
import av.filter
from av.container import OutputContainer
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from re2tal.data.building.check import Normalised, Samples
from re2tal.data.building.probe import MAX_DAMAGED, VideoProbe, displayed_size, open_video
from re2tal.data.building.shown import Damage, Orientation, colours_of, orientation_of, shown_frames
from re2tal.data.contract.manifest import Encoding, FramesPerSecond, FramesPerVideo

T = TypeVar("T")
MAX_ASPECT = 8
"""Largest ratio of the sides; beyond it the scaled width would have no bound."""
_SMPTE_170M = 6
"""The matrix of BT.601 in the numbers of the H.264 standard."""
# FFmpeg pads a row of RGB to 96, 192 or 288 bytes; where that is a multiple of the width, decord takes it for wider
# pixels and gives an error. Found by trying all widths to 130; none above 72 can be concerned.
_REFUSED_WIDTHS = frozenset({2, 4, 6, 8, 12, 16, 24, 48, 72})


def normalise_video(
    source: Path, target: Path, *, probe: VideoProbe, encoding: Encoding, max_damaged: float = MAX_DAMAGED
) -> Normalised:
    """Write `source` to `target` as an mp4 in the given encoding; the same bytes for the same input and libraries.

    Raises ValueError where more than the share `max_damaged` of the source's frames is damaged or missing.
    """
    rate, num_frames = sampling_grid(probe.duration_seconds, encoding)
    damage = Damage(num_frames=probe.num_missing, missing=probe.num_missing)
    samples = Samples(rate, num_frames, probe.orientation)
    with open_video(source) as (container, stream):
        shown = samples.taken_from(shown_frames(container, stream, damage))
        frames = nearest_in_time(shown, rate=rate, num_frames=num_frames)
        pictures = _scaled(frames, stream, orientation=probe.orientation, short_side=encoding.short_side)
        size = _write(target, _naming(source, pictures), rate=rate, encoding=encoding)
    if damage.share > max_damaged or size is None:
        raise ValueError(f"{source} is damaged: {damage}; replace the file, or allow more with --max-damaged")
    return Normalised(num_frames, float(rate), *size, damage, samples.pictures)


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


def _naming(path: Path, pictures: Iterator[T]) -> Iterator[T]:
    """Pass pictures through; turn errors into ValueErrors that name the file."""
    try:
        yield from pictures
    except av.FFmpegError as error:
        raise ValueError(f"{path} is damaged: {error.strerror}; replace the file") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _write(
    target: Path, pictures: Iterator[av.VideoFrame], *, rate: Fraction, encoding: Encoding
) -> tuple[int, int] | None:
    """Encode pictures of one size at a constant rate; gives their (width, height), None where there is no picture."""
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
                return None
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
    # Readers that look at tags and those that don't both take this for what it is: untagged video is BT.601 to FFmpeg.
    stream.codec_context.color_range, stream.codec_context.colorspace = ColorRange.MPEG, _SMPTE_170M
    return stream


def _scaled(
    frames: Iterator[av.VideoFrame], source: VideoStream, *, orientation: Orientation, short_side: int
) -> Iterator[av.VideoFrame]:
    """Frames as upright yuv420p pictures of one size and range, also where the source changes its own on the way."""
    size = None
    graphs: dict[tuple, av.filter.Graph] = {}
    for frame in frames:
        size = size or stored_size(displayed_size(frame, source), short_side=short_side)
        turned = orientation_of(frame) or orientation
        kind = (frame.width, frame.height, frame.format.name, turned, colours_of(frame))
        if kind not in graphs:
            graphs[kind] = _scaling_graph(frame, size, turned)
        graphs[kind].vpush(frame)
        picture = graphs[kind].vpull()
        picture.color_range, picture.colorspace = ColorRange.MPEG, _SMPTE_170M
        yield picture


def _scaling_graph(frame: av.VideoFrame, size: tuple[int, int], orientation: Orientation) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    full_range, matrix = colours_of(frame)
    colours = f"in_range={'full' if full_range else 'limited'}:in_color_matrix={matrix}"
    target = "out_range=limited:out_color_matrix=bt601"
    graph.link_nodes(
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)),
        *(graph.add(*step) for step in orientation.filters()),
        graph.add(
            "scale", f"{size[0]}:{size[1]}:flags=bicubic+accurate_rnd+full_chroma_int+bitexact:{colours}:{target}"
        ),
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
