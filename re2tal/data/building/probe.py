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
from uuid import UUID

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from re2tal.data.building.isolated import still_working
from re2tal.data.building.picture_times import PAUSE_SECONDS, is_even
from re2tal.data.building.shown import Damage, Orientation, orientation_of, origin_seconds

_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg",
    "protocol_whitelist": "file",
}
MAX_DAMAGED = 0.02
"""Share of the frames that may be absent or damaged unless the user says otherwise."""
LEAST_GAP_SECONDS = 0.2
"""A camera may be silent for so long, and the header of a Matroska file be off by as much."""
MAX_AVI_SHIFT_SECONDS = 0.5
"""An AVI stores no times, so a lost packet shifts all later frames."""
_LIKE_MPEG4 = frozenset({"mpeg4", "h263", "flv", "wmv1", "wmv2", "msmpeg4", "msmpeg4v1", "msmpeg4v2"})
_UNNUMBERED = _LIKE_MPEG4 | {"vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "theora"}
"""Codecs whose decoders show garbage without a word after a packet that was lost."""
_ASF_HEADER, _ASF_FILE = (
    UUID(one).bytes_le for one in ("75b22630-668e-11cf-a6d9-00aa0062ce6c", "8cabdca1-a947-11cf-8ee4-00c00c205365")
)
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
        num_frames, num_missing, still_seconds, duration = _scan(path, container, stream)
    if num_missing > max_missing * (num_frames + num_missing):
        what = "is cut short: its header promises" if stream.frames else "is cut short or has holes: its times are of"
        raise ValueError(
            f"{path} {what} {num_frames + num_missing} frames, {num_frames} are there; download or copy it again, or "
            "allow more with --max-damaged"
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
    codec.options = {"err_detect": "crccheck+bitstream+buffer" if codec.name in _LIKE_MPEG4 else "crccheck"}
    return stream


def _preference(stream: VideoStream) -> tuple[bool, int]:
    """As FFmpeg chooses: what is marked as the default, then the largest picture."""
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    return is_default, stream.codec_context.width * stream.codec_context.height


def _scan(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, int, float, Fraction]:
    """(packets that are shown, frames that should be there besides, seconds of pauses, seconds that all last)."""
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
        missing = _missing_of_avi(path, shown, stream)
    elif container.format.name.startswith("mov"):  # says how long each frame is shown, so it has no gaps
        missing = min(stream.frames, len(stream.index_entries)) - total  # an edit list takes hidden ones off the index
    else:
        absent_seconds = (container.duration or 0) / av.time_base - end_seconds if has_length else 0
        missing, still = (stream.frames - total, 0.0) if stream.frames else _missing_in_gaps(shown, stream)
        missing += round(absent_seconds * len(shown) / float(seconds)) if absent_seconds > LEAST_GAP_SECONDS else 0
        missing += _missing_by_size(path, len(shown))
    return len(shown), max(0, missing), still, seconds


def _missing_of_avi(path: Path, shown: list[tuple[int, int]], stream: VideoStream) -> int:
    """Frames that an AVI lacks, by its size or its header.

    A place without a packet is a frame that was dropped on purpose, and some headers count fields. Raises ValueError
    where so many packets are gone that the times of the others are not known.
    """
    if cut_off := _missing_by_size(path, len(shown)):
        return cut_off
    places = sum(max(shown))
    missing = stream.frames - places
    if missing <= 0 or abs(stream.frames - 2 * places) <= 2:
        return 0
    if missing * (stream.time_base or 0) > MAX_AVI_SHIFT_SECONDS:
        raise ValueError(
            f"{path} is damaged: its header promises {stream.frames} frames, {places} are there, and nothing tells "
            "when they are shown; replace the file"
        )
    return missing // max(shown)[1]


def _missing_by_size(path: Path, num_shown: int) -> int:
    """Frames behind the end of a file whose header says more bytes than it has: of an AVI or ASF (WMV)."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    promised = 8 + int.from_bytes(head[4:8], "little") if head[:4] == b"RIFF" else 0
    if head.startswith(_ASF_HEADER) and (place := head.find(_ASF_FILE)) >= 0:
        # Its length, an id and the size of the file, which holds where the first flag, of a live stream, is not set.
        size_field, flags = (int.from_bytes(head[at : at + 8], "little") for at in (place + 40, place + 88))
        promised = 0 if flags & 1 else size_field
    size = path.stat().st_size
    return round(num_shown * (promised / size - 1)) if promised > size else 0


def _missing_in_gaps(shown: list[tuple[int, int]], stream: VideoStream) -> tuple[int, float]:
    """(frames that a stream of constant rate lacks, seconds in which it paused).

    Of streams whose rate varies nothing can be said. Cameras drop a frame now and then: where the container is not made
    for broadcast, a short gap is no damage. But in a steady stream it is, if nothing else could tell that a packet was
    lost.
    """
    times = np.sort(np.array([time for time, _ in shown]))
    steps = np.diff(times)
    if stream.time_base is None or not is_even(steps):
        return 0, 0.0
    usual, name = float(np.median(steps)), stream.codec_context.name
    least = 1.5 * usual
    is_steady = np.mean(np.abs(steps - usual) <= max(0.1 * usual, 0.0015 / float(stream.time_base))) >= 0.98
    is_broadcast = stream.container.format.name in ("mpegts", "mpeg")
    if not is_broadcast and not (is_steady and name in _UNNUMBERED):
        least = max(4.5 * usual, LEAST_GAP_SECONDS / float(stream.time_base))
    gaps = steps[steps > least]
    pause = float("inf") if is_broadcast else PAUSE_SECONDS / float(stream.time_base)
    still = float((gaps[gaps >= pause] - usual).sum()) * float(stream.time_base)
    return int(np.rint(gaps[gaps < pause] / usual - 1).sum()), still


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
    origin = origin_seconds(container)
    late = max(Fraction(0), first * base - origin) if origin is not None else Fraction(0)
    times = np.sort(np.array([time for time, _ in shown]))
    longest = max(float(late), float(np.diff(times).max(initial=0)) * float(base), last_duration * float(base))
    usual = float(np.median(np.diff(times))) * float(base) if len(times) > 1 else 0.0
    if longest > max(60.0, 0.5 * float(seconds + late), 100 * usual) and len(shown) > 2:
        raise ValueError(
            f"{path}: one frame would be shown for {longest:.0f} s of {float(seconds + late):.0f} s: a time stamp is "
            "wrong; convert it to mp4 at a constant rate"
        )
    return seconds + late
