"""decord from memory.

decord is exact on the files that `re2tal shards build` writes (H.264, closed groups of pictures, constant rate, no edit
list) and only on such files; on others it may return wrong frames, or never return. Give it nothing else.

A live reader keeps decoding ahead without a limit (gigabytes within seconds), so no reader outlives the call that
opened it.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING

# Before decord, whose old libvpx would otherwise take the place of PyAV's in the whole process.
import av  # noqa: F401
import numpy as np

from re2tal.data.streaming.decoders.base import check_numbers, not_decoded, not_opened

if TYPE_CHECKING:
    from torch import Tensor

try:
    import decord
except (ImportError, OSError):  # it is published for Linux and Windows on x86-64 alone
    decord = None
else:
    decord.logging.set_level(decord.logging.QUIET)  # every failure raises; FFmpeg's own lines would only drown it


def count_frames(video: bytes) -> int:
    """How many frames decord sees in the file; DecodeError if the bytes cannot be opened as a video."""
    return len(_open(video))


def decode(video: bytes, numbers: np.ndarray, *, at_once: int) -> Iterator[Tensor]:
    """As `Decoder`."""
    from torch.utils.dlpack import from_dlpack  # here: it is slow to import, and `pictures` needs none of it

    for batch in _batches(video, numbers, at_once=at_once):
        yield from_dlpack(batch.to_dlpack())  # without a copy; `asnumpy` makes one, and doubles the peak


def pictures(video: bytes, numbers: np.ndarray) -> np.ndarray:
    """All that `decode` gives, (n, H, W, 3) uint8 RGB, without torch. Raises as it does."""
    (batch,) = _batches(video, numbers, at_once=len(numbers))
    return batch.asnumpy()


def _batches(video: bytes, numbers: np.ndarray, *, at_once: int) -> Iterator[decord.nd.NDArray]:
    reader = _open(video)
    check_numbers(numbers, len(reader))
    # One reader for all parts: to open it again would scan the file again.
    for start in range(0, len(numbers), at_once):
        some = numbers[start : start + at_once]
        try:
            batch = reader.get_batch(some)
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
            raise not_decoded(numbers, error) from None
        if batch.shape[0] != len(some):
            raise not_decoded(numbers, f"{len(some)} frames asked, {batch.shape[0]} decoded; the file is damaged")
        yield batch


def _open(video: bytes) -> decord.VideoReader:
    try:
        # fault_tol=1 is the tightest setting (0 and -1 switch the check off): it raises where decord would
        # otherwise repeat frames in silence, or retry for ever.
        return decord.VideoReader(BytesIO(video), ctx=decord.cpu(0), num_threads=1, fault_tol=1)
    except (decord.DECORDError, RuntimeError) as error:
        raise not_opened(video, error) from None
