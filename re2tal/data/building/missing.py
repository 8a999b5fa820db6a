"""How many frames a file lacks, by what its container says before any of them is decoded.

size     an AVI or WMV has fewer bytes than its header says, or an Ogg file ends within a page
count    an AVI has fewer frames than its header says
gaps     in the times of a stream of constant rate
"""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import numpy as np
from av.video.stream import VideoStream

from re2tal.data.building.picture_times import LOST_STEP, PAUSE_SECONDS, is_even

LIKE_MPEG4 = frozenset({"mpeg4", "h263", "flv", "wmv1", "wmv2", "msmpeg4", "msmpeg4v1", "msmpeg4v2"})
LEAST_GAP_SECONDS = 0.2
"""A camera may be silent for so long, and the header of a Matroska file be off by as much."""
_MAX_AVI_SHIFT_SECONDS = 0.5
"""An AVI stores no times, so a lost packet shifts all later frames."""
_UNNUMBERED = LIKE_MPEG4 | {"vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "theora"}
"""Codecs whose decoders show garbage without a word after a packet that was lost."""
_ASF_HEADER, _ASF_FILE = (
    UUID(one).bytes_le for one in ("75b22630-668e-11cf-a6d9-00aa0062ce6c", "8cabdca1-a947-11cf-8ee4-00c00c205365")
)
_OGG_PAGE_BYTES = 27 + 255 + 255 * 255


def missing_of_avi(path: Path, shown: list[tuple[int, int]], stream: VideoStream) -> int:
    """Frames that an AVI lacks, by its size or its header.

    A place without a packet is a frame that was dropped on purpose, and some headers count fields. Raises ValueError
    where so many packets are gone that the times of the others are not known.
    """
    if cut_off := missing_by_size(path, len(shown)):
        return cut_off
    places = sum(max(shown))
    missing = stream.frames - places
    if missing <= 0 or abs(stream.frames - 2 * places) <= 2:
        return 0
    if missing * (stream.time_base or 0) > _MAX_AVI_SHIFT_SECONDS:
        raise ValueError(
            f"{path} is damaged: its header promises {stream.frames} frames, {places} are there, and nothing tells "
            "when they are shown; replace the file"
        )
    return missing // max(shown)[1]


def missing_by_size(path: Path, num_shown: int) -> int:
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


def ends_in_a_page(path: Path) -> bool:
    """Whether an Ogg file is shorter than its last page says (RFC 3533, section 6)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _OGG_PAGE_BYTES))
        tail = file.read()
    place = tail.rfind(b"OggS\0")
    page = tail[place:]
    # The sizes of its parts follow the header.
    return place >= 0 and (len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]))


def missing_in_gaps(shown: list[tuple[int, int]], stream: VideoStream) -> tuple[int, float]:
    """(frames that a stream of constant rate lacks, seconds in which it paused).

    Of streams whose rate varies nothing can be said. Cameras drop a frame now and then: where the container is not made
    for broadcast, a short gap is no damage. But in a steady stream it is, if nothing else could tell that a packet was
    lost. An mp4 says how long each frame is shown, so there it is damage only after MPEG-4 part 2 and its like.
    """
    times = np.sort(np.array([time for time, _ in shown]))
    steps = np.diff(times)
    if stream.time_base is None or not is_even(steps):
        return 0, 0.0
    usual, name = float(np.median(steps)), stream.codec_context.name
    # Every other frame of a film repeats a field: the median is 2 fields or 3, by chance.
    usual = float(steps[np.abs(steps - usual) <= 0.6 * usual].mean())
    least = LOST_STEP * usual
    is_steady = np.mean(np.abs(steps - usual) <= max(0.1 * usual, 0.0015 / float(stream.time_base))) >= 0.98
    container = stream.container.format.name
    is_broadcast = container in ("mpegts", "mpeg")
    if container.startswith("mov") and not (is_steady and name in LIKE_MPEG4):
        return 0, 0.0
    if not is_broadcast and not (is_steady and name in _UNNUMBERED):
        least = max(4.5 * usual, LEAST_GAP_SECONDS / float(stream.time_base))
    gaps = steps[steps > least]
    pause = float("inf") if is_broadcast else PAUSE_SECONDS / float(stream.time_base)
    still = float((gaps[gaps >= pause] - usual).sum()) * float(stream.time_base)
    return int(np.rint(gaps[gaps < pause] / usual - 1).sum()), still
