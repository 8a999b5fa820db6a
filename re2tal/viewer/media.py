"""Videos over HTTP, whole or in the ranges that a browser asks for when it seeks (RFC 9110, section 14).

A video is a file, or a member of a shard: tar stores members whole, so a range of one is a range of the tar.
"""

from __future__ import annotations

import mimetypes
import re
import tarfile
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 18
# At most 18 digits, which any 64-bit number holds.
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `first` to `last` of a file, both included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Media:
    """Where a video is."""

    path: Path
    """Its file, or the tar that holds it."""
    pair_offset: int | None = None
    """In a tar: where the header of its json starts, which the video follows."""

    def name_and_bytes(self, file: BinaryIO) -> tuple[str, Span]:
        """Its name, and where its bytes are in the opened `path`; ValueError where no video is there."""
        if self.pair_offset is None:
            return self.path.name, Span(0, file.seek(0, 2) - 1)
        file.seek(self.pair_offset)
        try:
            with tarfile.open(fileobj=file, mode="r:") as pair:
                # Headers alone are read: a shard is not gone through for one video.
                _, video = pair.next(), pair.next()
        except tarfile.TarError as error:
            raise ValueError(f"{self.path} is damaged at byte {self.pair_offset}: {error}") from None
        if video is None or not video.isreg() or not video.name.endswith(".mp4"):
            raise ValueError(f"{self.path} holds no video at byte {self.pair_offset}; was it changed?")
        return video.name, Span(video.offset_data, video.offset_data + video.size - 1)


class NotSatisfiable(ValueError):
    """A range outside of the file."""


def parse_range(header: str | None, size: int) -> Span | None:
    """The one range that a header asks for; None where the whole file is the right answer.

    A header of another unit, of several ranges, or without sense is ignored, as the standard allows.
    """
    match = _RANGE.fullmatch((header or "").replace(" ", ""))
    if match is None or match[1] == match[2] == "":
        return None
    if not match[1]:
        length = min(int(match[2]), size)
        if not length:
            raise NotSatisfiable
        return Span(size - length, size - 1)
    first = int(match[1])
    last = min(int(match[2]), size - 1) if match[2] else size - 1
    if match[2] and int(match[2]) < first:
        return None
    if first >= size:
        raise NotSatisfiable
    return Span(first, last)


def send_media(handler: BaseHTTPRequestHandler, media: Media) -> None:
    """Answer a GET or HEAD for a video that the caller has allowed; the caller's `end_headers` adds its own headers."""
    with media.path.open("rb") as file:
        name, whole = media.name_and_bytes(file)
        size = whole.last + 1 - whole.first
        try:
            span = parse_range(handler.headers.get("Range"), size)
        except NotSatisfiable:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{size}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(200 if span is None else 206)
        handler.send_header("Content-Type", mimetypes.guess_type(name)[0] or "application/octet-stream")
        handler.send_header("Accept-Ranges", "bytes")
        if span is not None:
            handler.send_header("Content-Range", f"bytes {span.first}-{span.last}/{size}")
        span = span or Span(0, size - 1)
        left = span.last - span.first + 1
        handler.send_header("Content-Length", str(left))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        file.seek(whole.first + span.first)
        # In pieces: a video may not fit in memory, and a browser that seeks hangs up in the middle.
        while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
            handler.wfile.write(chunk)
            left -= len(chunk)
