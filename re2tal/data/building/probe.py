"""Check whether a video file is sound, and describe it.

Opens a file for reading with every way out closed: no playlist, no network, no other file. Containers that name other
files (HLS, DASH, concat scripts) are not on the list of formats, so a text file called mp4 cannot make us read one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from re2tal.data.building.isolated import still_working
from re2tal.data.building.missing import (
    LEAST_GAP_SECONDS,
    LIKE_MPEG4,
    ends_in_a_page,
    missing_by_size,
    missing_in_gaps,
    missing_of_avi,
)
from re2tal.data.building.shown import Damage, Orientation, orientation_of, origin_seconds

_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg",
    "protocol_whitelist": "file",
}
MAX_DAMAGED = 0.02
"""Share of the frames that may be absent or damaged unless the user says otherwise."""
_MAX_UNEVEN_SECONDS = 0.2
"""How far a frame may be from where its number puts it, of a video whose frames are told by number."""
_PICTURE_CODECS = frozenset({"png", "mjpeg", "bmp", "gif", "tiff", "webp", "jpeg2000", "jpegls"})


@dataclass(frozen=True, slots=True)
class VideoProbe:
    """What a sound video file holds."""

    codec: str
    num_frames: int
    """Packets that are shown; decoding may give a few less."""
    num_missing: int
    """Frames that are not there, according to gaps in time or to the header."""
    still_seconds: float
    """In which the recording paused."""
    duration_seconds: Fraction
    """From the start of a player's clock, possibly before the first frame, to the end of the last frame."""
    rate: float | None
    """Frame i is shown at i / rate on that clock; None where frames come unevenly, or begin late."""
    width: int
    """As shown: after rotation, with square pixels."""
    height: int
    orientation: Orientation
    """How the first frame is turned."""

    @property
    def damage(self) -> Damage:
        """What is known before any frame is decoded."""
        return Damage(num_frames=self.num_missing, missing=self.num_missing, still_seconds=self.still_seconds)


def probe_video(path: Path, *, max_missing: float = MAX_DAMAGED) -> VideoProbe:
    """Read a video's header, all its packets (not decoded) and its first frame.

    Raises ValueError naming the file and the reason where it is not a sound video, or where more than the share
    `max_missing` of its frames is not there.
    """
    with open_video(path) as (container, stream):
        codec = stream.codec_context.name
        promised = stream.frames
        num_frames, num_missing, still_seconds, duration, rate = _scan(path, container, stream)
    if num_missing > max_missing * (num_frames + num_missing):
        told_by = ": its header promises" if promised > num_frames else " or has holes: its times are of"
        raise ValueError(
            f"{path} is cut short{told_by} {num_frames + num_missing} frames, {num_frames} are there; download or copy "
            "it again, or allow more with --max-damaged"
        )
    with open_video(path) as (container, stream):
        frame = _first_frame(container, stream)
        if frame is None:
            raise ValueError(f"{path}: none of its {num_frames} frames can be decoded; replace the file")
        width, height = displayed_size(frame, stream)
    return VideoProbe(
        codec=codec,
        num_frames=num_frames,
        num_missing=num_missing,
        still_seconds=still_seconds,
        duration_seconds=duration,
        rate=rate,
        width=width,
        height=height,
        orientation=orientation_of(frame) or Orientation(),
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
    except av.ArgumentError:
        raise ValueError(
            f"{path} cannot be read as a video: its container is not known here; convert it to mp4"
        ) from None
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error.strerror}; replace the file") from None


def _first_frame(container: InputContainer, stream: VideoStream) -> av.VideoFrame | None:
    """The first frame that decodes; a recorded broadcast may begin with some that do not."""
    for packet in container.demux(stream):
        with suppress(av.InvalidDataError):
            if frames := packet.decode():
                frame = frames[0]
                assert isinstance(frame, av.VideoFrame)
                return frame
    return None


def displayed_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(width, height) of a frame as a player shows it: square pixels, turned."""
    width, height = round(frame.width * (stream.sample_aspect_ratio or 1)), frame.height
    orientation = orientation_of(frame)
    return (height, width) if orientation and orientation.swapped else (width, height)


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    """The stream that players choose. A cover picture is a video stream too; it is skipped."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        names = {"video": "a cover picture"}
        kinds = ", ".join(sorted({names.get(s.type, s.type) for s in container.streams})) or "nothing"
        raise ValueError(f"{path} has no video stream, only {kinds}; replace the file")
    if any(s.codec_context is None for s in streams):
        raise ValueError(f"{path}: no decoder for its video stream; convert it to H.264")
    # A cover that lost its mark: one picture in a codec of pictures, beside a real video.
    moving = [s for s in streams if s.codec_context.name not in _PICTURE_CODECS] or streams
    best = container.streams.best("video")
    stream = best if best in moving else max(moving, key=_preference)
    assert isinstance(stream, VideoStream)
    codec = stream.codec_context
    if codec.name == "vp9" and codec.format is not None and codec.format.components[0].bits > 8:
        # libvpx, as it comes with PyAV, knows 8; FFmpeg's own decoder shows garbage without a word.
        raise ValueError(f"{path} is VP9 of more than 8 bits, in which damage would not be seen; convert it to H.264")
    codec.thread_count = 1  # work is spread over processes
    # Checksums of pictures that carry one (HEVC, FFV1), and whether those of MPEG-4's kin end where their bytes do.
    codec.options = {"err_detect": "crccheck+bitstream+buffer" if codec.name in LIKE_MPEG4 else "crccheck"}
    return stream


def _preference(stream: VideoStream) -> tuple[bool, int]:
    """As FFmpeg chooses: what is marked as the default, then the largest picture."""
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    return is_default, stream.codec_context.width * stream.codec_context.height


def _scan(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, int, float, Fraction, float | None]:
    """(packets that are shown, frames that should be there besides, seconds of pauses, seconds that all last, rate)."""
    is_avi, has_length = container.format.name == "avi", container.format.name.startswith(("matroska", "flv"))
    total, shown, end_seconds = 0, [], 0.0
    # Sound too in a Matroska or Flash file: its header gives the length of all streams together.
    for packet in container.demux() if has_length else container.demux(stream):
        still_working()
        # What FFmpeg guesses for the pictures of an AVI that reorders is wrong; the places of its chunks are right.
        time = packet.dts if packet.pts is None or is_avi else packet.pts
        if packet.size == 0:  # the end marker
            continue
        if time is not None and packet.time_base:
            end_seconds = max(end_seconds, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        if time is None:
            raise ValueError(f"{path}: packet {total} has no time stamp; convert it to mp4")
        total += 1
        if not packet.is_discard:  # an edit list hides such packets
            shown.append((time, packet.duration or 0))
    if not shown:
        raise ValueError(f"{path} has a video stream without frames; replace the file")
    if is_avi:  # a picture may be followed by places without one, the last picture too
        usual = int(np.median(np.diff([time for time, _ in shown]))) if len(shown) > 1 else 1
        shown = [(time, max(1, usual)) for time, _ in shown]
    seconds, still = _span_seconds(path, shown, container, stream), 0.0
    if is_avi:
        missing = missing_of_avi(path, shown, stream)
    elif container.format.name.startswith("mov"):
        missing, still = missing_in_gaps(shown, stream)
        missing += min(stream.frames, len(stream.index_entries)) - total  # an edit list takes hidden ones off the index
    else:
        absent_seconds = (container.duration or 0) / av.time_base - end_seconds if has_length else 0
        missing, still = (stream.frames - total, 0.0) if stream.frames else missing_in_gaps(shown, stream)
        missing += round(absent_seconds * len(shown) / float(seconds)) if absent_seconds > LEAST_GAP_SECONDS else 0
        missing += missing_by_size(path, len(shown))
        if container.format.name == "ogg" and ends_in_a_page(path):
            raise ValueError(
                f"{path} is cut short: its last page of Ogg is not whole, and nothing tells how much is gone; download "
                "or copy it again, or convert what is there to mp4"
            )
    return len(shown), max(0, missing), still, seconds, _even_rate(shown, container, stream, seconds)


def _even_rate(
    shown: list[tuple[int, int]], container: InputContainer, stream: VideoStream, seconds: Fraction
) -> float | None:
    if len(shown) == 1:
        return 1 / float(seconds)
    first = min(shown)[0]
    times = np.sort([time - first for time, _ in shown]) * float(stream.time_base or 0)
    rate = (len(times) - 1) / float(times[-1]) if times[-1] > 0 else len(times) / float(seconds)
    off = times + float(_late_seconds(first, container, stream)) - np.arange(len(times)) / rate
    return rate if np.abs(off).max() <= _MAX_UNEVEN_SECONDS else None


def _late_seconds(first: int, container: InputContainer, stream: VideoStream) -> Fraction:
    """How long after the start of a player's clock the first frame is shown."""
    origin = origin_seconds(container)
    return max(Fraction(0), first * (stream.time_base or 0) - origin) if origin is not None else Fraction(0)


def _span_seconds(path: Path, shown: list[tuple[int, int]], container: InputContainer, stream: VideoStream) -> Fraction:
    """From where a player's clock starts to the end of the last (time, duration), in seconds."""
    (first, _), (last, last_duration) = min(shown), max(shown)
    ticks = Fraction(last - first + last_duration)
    if last_duration == 0 and len(shown) > 1:
        # Some containers leave durations out: the last frame lasts as long as those before it on average.
        ticks += Fraction(last - first, len(shown) - 1)
    base = stream.time_base or Fraction(0)
    seconds = ticks * base
    if seconds <= 0 and stream.average_rate:
        seconds = len(shown) / stream.average_rate
    if seconds <= 0:
        raise ValueError(f"{path}: its {len(shown)} frames last no time; convert it to mp4 at a constant rate")
    late = _late_seconds(first, container, stream)
    times = np.sort(np.array([time for time, _ in shown]))
    longest = max(float(late), float(np.diff(times).max(initial=0)) * float(base), last_duration * float(base))
    usual = float(np.median(np.diff(times))) * float(base) if len(times) > 1 else 0.0
    if longest > max(60.0, 0.5 * float(seconds + late), 100 * usual) and len(shown) > 2:
        raise ValueError(
            f"{path}: one frame would be shown for {longest:.0f} s of {float(seconds + late):.0f} s: a time stamp is "
            "wrong; convert it to mp4 at a constant rate"
        )
    return seconds + late
