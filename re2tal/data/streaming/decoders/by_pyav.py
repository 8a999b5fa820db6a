"""PyAV from memory: every frame is decoded from the start of the file on, the wanted ones become RGB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation

from re2tal.data.streaming.decoders.base import check_numbers, not_decoded, not_opened

if TYPE_CHECKING:
    from torch import Tensor

_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
"""By the number that the H.264 standard has for it; BT.601 for the others, and where the file names none."""


def count_frames(video: bytes) -> int:
    """How many frames the file holds; DecodeError if the bytes cannot be opened as a video."""
    with _opened(video) as (_, packets):
        return len(packets)


def decode(video: bytes, numbers: np.ndarray, *, at_once: int) -> Iterator[Tensor]:
    """As `Decoder`."""
    from torch import from_numpy  # here: it is slow to import, and `pictures` needs none of it

    for batch in _batches(video, numbers, at_once=at_once):
        yield from_numpy(batch)


def pictures(video: bytes, numbers: np.ndarray) -> np.ndarray:
    """All that `decode` gives, (n, H, W, 3) uint8 RGB, without torch. Raises as it does."""
    (batch,) = _batches(video, numbers, at_once=len(numbers))
    return batch


def _batches(video: bytes, numbers: np.ndarray, *, at_once: int) -> Iterator[np.ndarray]:
    with _opened(video) as (stream, packets):
        check_numbers(numbers, len(packets))
        yield from _pictures(stream, packets, numbers, at_once=at_once)


@contextmanager
def _opened(video: bytes) -> Iterator[tuple[av.VideoStream, list[av.Packet]]]:
    try:
        # decord counts the packets that an edit list hides as frames; the index was checked against that count.
        container = av.open(BytesIO(video), "r", options={"ignore_editlist": "1"})
    except (av.FFmpegError, ValueError) as error:
        raise not_opened(video, error) from None
    with container:
        if not container.streams.video:
            raise not_opened(video, ValueError("there is no stream of pictures"))
        stream = container.streams.video[0]
        try:
            # An empty packet marks the end of the stream and holds no picture.
            packets = [packet for packet in container.demux(stream) if packet.size]
        except av.FFmpegError as error:
            raise not_opened(video, error) from None
        yield stream, packets


def _pictures(
    stream: av.VideoStream, packets: list[av.Packet], numbers: np.ndarray, *, at_once: int
) -> Iterator[np.ndarray]:
    # The number of a picture is the rank of its time, as decord has it, not a count of what came out: a decoder may
    # lose a frame without a word.
    times = np.sort([packet.pts for packet in packets])[numbers]
    found: list[np.ndarray] = []
    done = 0
    for frame in _decoded(stream, packets, numbers):
        if done < len(times) and frame.pts == times[done]:
            # decord's conversion: by the matrix that the file names, as copied files may name any.
            matrix = _MATRICES.get(int(frame.colorspace), Colorspace.ITU601)
            rgb = frame.reformat(format="rgb24", src_colorspace=matrix, interpolation=Interpolation.BICUBIC)
            found.append(rgb.to_ndarray())
            done += 1
            if len(found) == at_once or done == len(times):
                yield np.stack(found)
                found.clear()
        if done == len(times):
            return
    raise not_decoded(numbers, f"{len(times)} frames asked, {done} decoded; the file is damaged")


def _decoded(stream: av.VideoStream, packets: list[av.Packet], numbers: np.ndarray) -> Iterator[av.VideoFrame]:
    """In the order of display; DecodeError at the first one that is damaged."""
    # The workers already fill the cores; threads of their own would only contend.
    stream.codec_context.thread_count = 1
    # FFmpeg otherwise fills damaged pictures with parts of others, and says nothing.
    stream.codec_context.options = {"err_detect": "explode"}
    try:
        # None asks for the pictures that the decoder holds back to reorder them.
        for packet in (*packets, None):
            for frame in stream.codec_context.decode(packet):
                if frame.is_corrupt:
                    raise not_decoded(numbers, f"the picture at tick {frame.pts} is damaged")
                yield frame
    except av.FFmpegError as error:
        raise not_decoded(numbers, error) from None
