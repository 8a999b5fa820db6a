"""Is this video sound, and what is in it?

Opens a file for reading with every way out closed: no playlist, no network, no other file. Containers that name other
files (HLS, DASH, concat scripts) are not on the list of formats, so a text file called mp4 cannot make us read one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.video.stream import VideoStream

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")
_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf",
    "protocol_whitelist": "file",
}
MAX_MISSING_SHARE = 0.02
"""Share of the promised frames that may be absent; streams cut at both ends lose a few, a damaged file loses many."""


@dataclass(frozen=True, slots=True)
class VideoProbe:
    """What a sound video file holds."""

    codec: str
    num_frames: int
    """Packets that are shown; decoding may give a few less."""
    duration_seconds: Fraction
    """From the first frame's appearance to the last one's end."""
    width: int
    """As shown: after rotation, with square pixels."""
    height: int
    rotation_degrees: int
    """0, 90, 180 or 270, anticlockwise, which the player applies."""


def probe_video(path: Path) -> VideoProbe:
    """Read a video's header, all its packets (not decoded) and its first frame.

    Raises ValueError naming the file and the reason where it is not a sound video.
    """
    with open_video(path) as (container, stream):
        codec = stream.codec_context.name
        num_frames, duration = _scan(path, container, stream)
    with open_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError(f"{path}: none of its {num_frames} frames can be decoded; replace the file")
        width, height = displayed_size(frame, stream)
    return VideoProbe(
        codec=codec,
        num_frames=num_frames,
        duration_seconds=duration,
        width=width,
        height=height,
        rotation_degrees=frame.rotation % 360,
    )


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """An open container and its first picture stream; FFmpeg's errors, also later ones, become ValueErrors."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; download or copy it again")
    try:
        with av.open(str(path), container_options=_OPEN_OPTIONS) as container:
            yield container, _video_stream(path, container)
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error.strerror}; replace the file") from None


def displayed_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(width, height) of a frame as a player shows it: square pixels, rotated."""
    width, height = round(frame.width * (stream.sample_aspect_ratio or 1)), frame.height
    return (height, width) if frame.rotation % 180 else (width, height)


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    # A cover picture is a video stream too, but of one frame and marked as attached.
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise ValueError(f"{path} has no video stream, only {kinds}; replace the file")
    stream = streams[0]
    if stream.codec_context is None:
        raise ValueError(f"{path}: no decoder for its video stream; convert it to H.264")
    stream.codec_context.thread_count = 1  # work is spread over processes
    return stream


def _scan(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, Fraction]:
    """Count the packets that are shown, and measure how long they last; refuse a file that holds too few."""
    total, shown = 0, []
    for packet in container.demux(stream):
        time = packet.dts if packet.pts is None else packet.pts
        if packet.size == 0:  # the end marker
            continue
        if time is None:
            raise ValueError(f"{path}: packet {total} has no time stamp; convert it to mp4")
        total += 1
        if not packet.is_discard:  # an edit list hides such packets
            shown.append((time, packet.duration or 0))
    if total < stream.frames * (1 - MAX_MISSING_SHARE):
        raise ValueError(
            f"{path} is cut short: its header promises {stream.frames} frames, {total} are there; "
            "download or copy it again"
        )
    if not shown:
        raise ValueError(f"{path} has a video stream without frames; replace the file")
    return len(shown), _span_seconds(path, shown, stream)


def _span_seconds(path: Path, shown: list[tuple[int, int]], stream: VideoStream) -> Fraction:
    """From the start of the first (time, duration) to the end of the last, in seconds."""
    (first, _), (last, last_duration) = min(shown), max(shown)
    ticks = Fraction(last - first + last_duration)
    if last_duration == 0 and len(shown) > 1:
        # Some containers leave durations out: the last frame lasts as long as those before it on average.
        ticks += Fraction(last - first, len(shown) - 1)
    seconds = ticks * (stream.time_base or 0)
    if seconds <= 0 and stream.average_rate:
        seconds = len(shown) / stream.average_rate
    if seconds <= 0:
        raise ValueError(f"{path}: its {len(shown)} frames last no time; convert it to mp4 at a constant rate")
    return seconds
