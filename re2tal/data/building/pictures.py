"""The pictures of a video at a constant rate, upright and of one size: what is encoded, and what is looked at directly.

    picture i  =  the source frame nearest to i / rate seconds on a player's clock; in a pause the one before it

Nothing here imports torch: a process that only decodes starts in a quarter of a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
import av.filter
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from re2tal.data.building.picture_times import PAUSE_SECONDS
from re2tal.data.building.probe import MAX_DAMAGED, VideoProbe, displayed_size, open_video
from re2tal.data.building.shown import Orientation, colours_of, orientation_of, shown_frames

T = TypeVar("T")
PICTURES_AT_ONCE = 16
"""A sixtieth of a second of work or less, and a few hundred kilobytes."""
MAX_ASPECT = 8
"""Largest ratio of the sides; beyond it the scaled width would have no bound."""
SMPTE_170M = 6
"""The matrix of BT.601 in the numbers of the H.264 standard."""
# FFmpeg pads a row of RGB to 96, 192 or 288 bytes; where that is a multiple of the width, decord takes it for wider
# pixels and gives an error. Found by trying all widths to 130; none above 72 can be concerned.
_REFUSED_WIDTHS = frozenset({2, 4, 6, 8, 12, 16, 24, 48, 72})


def pictures(
    source: Path,
    *,
    probe: VideoProbe,
    rate: Fraction,
    num_frames: int,
    short_side: int,
    max_damaged: float = MAX_DAMAGED,
) -> Iterator[np.ndarray]:
    """Pictures 0 to num_frames - 1 in pieces of (n, H, W, 3) uint8 RGB, n at most PICTURES_AT_ONCE.

    They are those that `encode` would store, before they are compressed. Raises ValueError where the source cannot be
    decoded, and at its end where more than the share `max_damaged` of its frames is damaged or missing.
    """
    damage = probe.damage
    with open_video(source) as (container, stream):
        frames = nearest_in_time(shown_frames(container, stream, damage), rate=rate, num_frames=num_frames)
        yuv = scaled(frames, stream, orientation=probe.orientation, short_side=short_side)
        yield from naming(source, _in_pieces(yuv))
    if damage.share > max_damaged:
        raise ValueError(f"{source} is damaged: {damage}; replace the file, or allow more with --max-damaged")


def _in_pieces(frames: Iterator[av.VideoFrame]) -> Iterator[np.ndarray]:
    reformatter = VideoReformatter()
    piece: list[np.ndarray] = []
    for frame in frames:
        rgb = reformatter.reformat(
            frame,
            format="rgb24",
            src_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
        )
        piece.append(rgb.to_ndarray())
        if len(piece) == PICTURES_AT_ONCE:
            yield np.stack(piece)
            piece = []
    if piece:
        yield np.stack(piece)


def nearest_in_time(timed: Iterator[tuple[Fraction, T]], *, rate: Fraction, num_frames: int) -> Iterator[T]:
    """For i = 0 ... num_frames - 1 the item that `is_earlier_shown` chooses at i / rate.

    `timed` are (seconds, item) in order of time. Nothing is yielded where there is no item.
    """
    wanted = 0
    previous: tuple[Fraction, T] | None = None
    for time, item in timed:
        if previous is not None:
            while wanted < num_frames and is_earlier_shown(wanted / rate, previous[0], time):
                yield previous[1]
                wanted += 1
        previous = time, item
    if previous is not None:
        for _ in range(wanted, num_frames):
            yield previous[1]


def is_earlier_shown(time: Fraction, earlier: Fraction, later: Fraction) -> bool:
    """Which of two frames is taken at a time between them: the nearer, the earlier of two as near, and in a pause."""
    return time < later if later - earlier > PAUSE_SECONDS else time - earlier <= later - time


def naming(path: Path, pictures: Iterator[T]) -> Iterator[T]:
    """Pass pictures through; turn errors into ValueErrors that name the file."""
    try:
        yield from pictures
    except av.FFmpegError as error:
        raise ValueError(f"{path} is damaged: {error.strerror}; replace the file") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def scaled(
    frames: Iterator[av.VideoFrame], source: VideoStream, *, orientation: Orientation, short_side: int
) -> Iterator[av.VideoFrame]:
    """Frames as upright yuv420p pictures of one size and range, also where the source changes its own on the way."""
    size = None
    graphs: dict[tuple, av.filter.Graph] = {}
    for frame in frames:
        size = size or stored_size(displayed_size(frame, source), short_side=short_side)
        turned = orientation_of(frame) or orientation
        # One graph per form: a recording may change its size, colours or turn on the way.
        kind = (frame.width, frame.height, frame.format.name, turned, colours_of(frame))
        if kind not in graphs:
            graphs[kind] = _scaling_graph(frame, size, turned)
        graphs[kind].vpush(frame)
        picture = graphs[kind].vpull()
        picture.color_range, picture.colorspace = ColorRange.MPEG, SMPTE_170M
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
