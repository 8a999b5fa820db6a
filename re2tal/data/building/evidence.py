"""What tells that packets are not what was written, besides the decoder: many codecs show garbage without a word.

the container     marks packets: a transport stream numbers its pieces, and the mark may be one packet early
checksums         of Matroska files (checksums.py)
zeros             arithmetic coding, and the escapes of H.264 and HEVC, make long runs of them impossible
frame numbers     of H.264 (frame_numbers.py)

consumption.py and picture_times.py find more when the pictures around are known.
"""

from __future__ import annotations

import re
from pathlib import Path

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from re2tal.data.building.checksums import broken_clusters
from re2tal.data.building.frame_numbers import FrameNumbers

# A run is taken whole, from its start: broadcasts of constant bit rate fill up packets with 100,000 zeros.
_ZEROS, _ZEROS_INSIDE = re.compile(rb"\0{32}"), re.compile(rb"(?<!\0)\0{32,}+[^\0\x01]")
# Zeros may fill up the end of a packet, and what is before the next start code, 00 00 01, where there are such codes.
_LOST = dict.fromkeys(("h264", "hevc", "libvpx", "libvpx-vp9", "vp8", "vp9"), _ZEROS) | dict.fromkeys(
    ("mpeg4", "mpeg1video", "mpeg2video", "h263", "libdav1d", "av1"), _ZEROS_INSIDE
)


class Evidence:
    """Looks at the packets of a stream in the order of decoding."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        codec = stream.codec_context
        is_matroska = container.format.name.startswith("matroska")
        self._clusters = broken_clusters(Path(container.name)) if is_matroska else []
        has_start_codes = codec.name in ("h264", "hevc") and bytes(codec.extradata or b"")[:1] != b"\1"
        self._zeros = _ZEROS_INSIDE if has_start_codes else _LOST.get(codec.name)
        self._was_corrupt = False
        self._numbers = FrameNumbers(bytes(codec.extradata or b"")) if codec.name == "h264" else None

    def is_lost(self, packet: av.Packet) -> bool:
        """Whether something of a packet, or of those before it, is gone."""
        content, place = bytes(packet), packet.pos or 0
        has_gap = self._numbers is not None and self._numbers.lacks_frames(content)
        has_zeros = self._zeros is not None and self._zeros.search(content) is not None
        is_corrupt, self._was_corrupt = packet.is_corrupt or self._was_corrupt, packet.is_corrupt
        return is_corrupt or has_gap or has_zeros or any(start <= place < end for start, end in self._clusters)
