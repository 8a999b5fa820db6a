"""Parts of a Matroska file whose bytes contradict the checksum before them (RFC 9559, RFC 8794).

    element = id, size, content; the content of a part of the file may begin with BF 84 and the CRC-32 of the rest

Writers that know the length of what they write put one into each cluster, FFmpeg and OBS among them; WebM has none.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import BinaryIO

_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_OTHERS = (0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1254C367, 0x1941A469, 0x1043A770, 0x1A45DFA3, 0xEC, 0xBF)
_PARTS = frozenset({_CLUSTER, *_OTHERS})
"""Clusters, and what else may stand beside them."""
_CHUNK = 1 << 20


def broken_clusters(path: Path) -> list[tuple[int, int]]:
    """(first byte, end) of each cluster that is not what was written; none where the file has no checksums."""
    broken = []
    size = path.stat().st_size
    with path.open("rb") as file:
        place, has_checksums = 0, False
        while place < size:
            head = _head(file, place)
            if head is None or not (head[0] in _PARTS or head[0] == _SEGMENT):
                # Nothing here can be told apart; a cluster's mark is where reading makes sense again.
                after = _next_cluster(file, place + 1)
                broken.append((place, after))
                place = after
                continue
            kind, start, length = head
            if kind == _SEGMENT:
                place = start
                continue
            if length is None:  # of a live stream: nobody knew its length
                return broken if has_checksums else []
            end = min(start + length, size)
            if (is_right := _fits(file, start, end)) is not None:
                has_checksums = True
                if not is_right and kind == _CLUSTER:
                    broken.append((place, end))
            place = end
    return broken if has_checksums else []


def _head(file: BinaryIO, place: int) -> tuple[int, int, int | None] | None:
    """(id, where the content starts, its length) of an element; None where there is none."""
    file.seek(place)
    data = file.read(12)
    id_bytes = _width(data[:1])
    size_bytes = _width(data[id_bytes : id_bytes + 1])
    if not 1 <= id_bytes <= 4 or not size_bytes or len(data) < id_bytes + size_bytes:
        return None
    value = int.from_bytes(data[id_bytes : id_bytes + size_bytes], "big") & ((1 << 7 * size_bytes) - 1)
    is_unknown = value == (1 << 7 * size_bytes) - 1
    return int.from_bytes(data[:id_bytes], "big"), place + id_bytes + size_bytes, None if is_unknown else value


def _width(first: bytes) -> int:
    """Bytes of a number that begins so: one more than its leading zeros; 0 where it is none."""
    return 9 - first[0].bit_length() if first and first[0] else 0


def _fits(file: BinaryIO, start: int, end: int) -> bool | None:
    """Whether a part has the checksum that it begins with; None where it begins with none."""
    file.seek(start)
    if (head := file.read(6))[:2] != b"\xbf\x84" or len(head) < 6:
        return None
    # In pieces: a cluster may have hundreds of megabytes.
    crc32, left = 0, end - start - 6
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        crc32, left = zlib.crc32(chunk, crc32), left - len(chunk)
    return crc32 == int.from_bytes(head[2:], "little")


def _next_cluster(file: BinaryIO, place: int) -> int:
    """Where the next cluster begins, or the file ends."""
    mark = _CLUSTER.to_bytes(4, "big")
    file.seek(place)
    before = b""
    while chunk := file.read(_CHUNK):
        if (found := (before + chunk).find(mark)) >= 0:
            return place - len(before) + found
        place += len(chunk)
        # The mark may lie across two chunks.
        before = chunk[-3:]
    return place
