"""The sample tables of an mp4: proof that frame i is the i-th picture shown, and the few groups that a clip needs.

decord numbers frames right only in H.264, HEVC and VP9 at a constant rate with closed groups of pictures, no delay and
no edits. All of this stands in the tables, so it is checked, without decoding, each time that a video is opened. As
groups are closed, a small mp4 of those that hold the wanted frames decodes to the same pictures as the whole file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from re2tal.data.contract.key_frames import stands_alone

_UPRIGHT = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # the unit matrix, in 16.16 and 2.30 bits
_CODECS = (b"avc1", b"hvc1", b"hev1", b"vp09")
"""What decord decodes right. It has no decoder for AV1, and drops or moves frames of MPEG-4 part 2."""
_MAX_OFF_SECONDS = 0.001  # a clock of milliseconds, as many files have, rounds each time
_REBUILD = "build the shards again with re2tal shards build, which re-encodes it"


@dataclass(frozen=True, slots=True, eq=False)
class Mp4:
    """A file whose frames decord numbers as they are shown. N frames, in the order of decoding, which is that of
    display up to the reordering inside groups."""

    content: bytes
    description: bytes
    """The stsd box: codec and its parameters."""
    offsets: np.ndarray
    """(N,) int64: where each frame's bytes start"""
    sizes: np.ndarray
    """(N,) int64"""
    ranks: np.ndarray
    """(N,) int64: its place in display order"""
    keys: np.ndarray
    """first frames of the groups, in order"""
    fps: float
    width: int
    height: int

    @property
    def num_frames(self) -> int:
        """N."""
        return len(self.sizes)

    def cut(self, indices: Sequence[int] | np.ndarray) -> tuple[bytes, np.ndarray]:
        """(an mp4 of only the groups that hold these frames, the numbers that the frames have there)."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= self.num_frames:
            raise ValueError(f"frames {wanted.tolist()[:4]} asked of a video with {self.num_frames} frames")
        groups, number = np.unique(np.searchsorted(self.keys, wanted, side="right") - 1, return_inverse=True)
        ends = np.append(self.keys, self.num_frames)
        lengths = ends[groups + 1] - ends[groups]
        starts = np.cumsum(lengths) - lengths
        samples = np.repeat(ends[groups] - starts, lengths) + np.arange(lengths.sum())
        ranks = self.ranks[samples] - np.repeat(ends[groups] - starts, lengths)
        return self._written(samples, ranks, starts), wanted - ends[groups][number] + starts[number]

    def _written(self, samples: np.ndarray, ranks: np.ndarray, keys: np.ndarray) -> bytes:
        """An mp4 of some samples, one unit of time each."""
        count, sizes, offsets = len(samples), self.sizes[samples], self.offsets[samples]
        delay = int((np.arange(count) - ranks).max())  # a picture cannot be shown before it is decoded
        shifts = np.stack([np.ones(count, np.int64), ranks - np.arange(count) + delay], axis=1)
        tables = (
            self.description,
            _table(b"stts", [[count, 1]]),
            _table(b"ctts", shifts),
            _table(b"stss", keys + 1),
            _table(b"stsc", [[1, count, 1]]),
            _full(b"stsz", struct.pack(">II", 0, count), sizes.astype(">u4").tobytes()),
        )
        # Once to learn how long it is, once with the place of the data behind it.
        head = self._head(tables, count, delay, place=0)
        head = self._head(tables, count, delay, place=len(head) + 16)  # mdat's own head is 16 bytes
        breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + sizes[:-1]) + 1
        firsts, lasts = np.append(0, breaks), np.append(breaks, count) - 1
        view = memoryview(self.content)
        stretches = zip(offsets[firsts].tolist(), (offsets[lasts] + sizes[lasts]).tolist(), strict=True)
        data = struct.pack(">I4sQ", 1, b"mdat", 16 + int(sizes.sum()))
        return b"".join([head, data, *(view[start:end] for start, end in stretches)])

    def _head(self, tables: Sequence[bytes], count: int, delay: int, *, place: int) -> bytes:
        rate = max(1, round(self.fps))
        stbl = _box(b"stbl", *tables, _table(b"stco", [place]))
        dinf = _box(b"dinf", _full(b"dref", struct.pack(">I", 1), _box(b"url ", b"\0\0\0\1")))
        minf = _box(b"minf", _full(b"vmhd", bytes(8)), dinf, stbl)
        hdlr = _full(b"hdlr", struct.pack(">I4s12x", 0, b"vide"), b"\0")
        mdhd = _full(b"mdhd", struct.pack(">IIIIHH", 0, 0, rate, count, 0x55C4, 0))
        tkhd = _full(b"tkhd", struct.pack(">IIIII16x", 0, 0, 1, 0, count), _UPRIGHT, self._size(), flags=3)
        edts = _box(b"edts", _full(b"elst", struct.pack(">IIiI", 1, count, delay, 1 << 16)))
        trak = _box(b"trak", tkhd, edts, _box(b"mdia", mdhd, hdlr, minf))
        times = struct.pack(">IIIIIH10x", 0, 0, rate, count, 1 << 16, 1 << 8)
        mvhd = _full(b"mvhd", times, _UPRIGHT, bytes(24), struct.pack(">I", 2))
        return _box(b"ftyp", b"isom\0\0\2\0isomavc1") + _box(b"moov", mvhd, trak)

    def _size(self) -> bytes:
        return struct.pack(">II", self.width << 16, self.height << 16)


def read_mp4(content: bytes) -> Mp4:
    """The tables of a file; ValueError says why its frames cannot be numbered with certainty."""
    try:
        return _read(content)
    except (struct.error, KeyError, IndexError) as error:  # all that a table cut short can raise below
        raise ValueError(f"its mp4 tables are incomplete ({error}); {_REBUILD}") from None


def _read(content: bytes) -> Mp4:
    moov = dict(_boxes(content, 0, len(content))).get("moov")
    if moov is None:
        raise ValueError(f"it is no mp4: there is no moov box in its {len(content)} bytes; {_REBUILD}")
    tracks = [_track(content, place) for kind, place in _boxes(content, *moov) if kind == "trak"]
    tracks = [track for track in tracks if content[track["hdlr"][0] + 8 : track["hdlr"][0] + 12] == b"vide"]
    if len(tracks) != 1:
        raise ValueError(f"it has {len(tracks)} picture tracks, and one is wanted; {_REBUILD}")
    boxes = tracks[0]
    description, (width, height) = _description(content, *boxes["stsd"])
    offsets, sizes = _samples(content, boxes)
    times = _times(content, boxes, len(sizes))
    order = np.argsort(times, kind="stable")  # equal times, in a damaged file, keep the order of decoding
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    keys = _rows(content, *boxes["stss"])[:, 0] - 1 if "stss" in boxes else np.arange(len(sizes))
    _check_groups(keys, ranks)
    _check_keys(content, description, offsets[keys], sizes[keys])
    timescale = _scale(content, *boxes["mdhd"])
    shown = times[order] - times[order[0]]
    fps = _rate(shown / timescale, timescale / int(_rows(content, *boxes["stts"], columns=2)[0, 1] or 1))
    movie = _scale(content, *dict(_boxes(content, *moov))["mvhd"])
    _check_edits(content, boxes, first=int(times.min()), last=int(times.max()), movie=movie / timescale)
    start = boxes["tkhd"][0]
    matrix = start + (52 if content[start] == 1 else 40)  # version 1 has times of 64 bits
    if content[matrix : matrix + 36] != _UPRIGHT:
        raise ValueError(f"it is to be turned or mirrored when shown; {_REBUILD}")
    return Mp4(content, description, offsets, sizes, ranks, keys, fps, width, height)


def _track(content: bytes, place: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Where the boxes of a track are."""
    found = dict(_boxes(content, *place))
    for parent in ("edts", "mdia", "minf", "stbl"):
        if parent in found:
            found = dict(_boxes(content, *found[parent])) | found  # QuickTime has a second hdlr, of the data
    return found


def _boxes(content: bytes, start: int, end: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """(kind, (first byte of its body, end)) of the boxes in a stretch."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", content, start)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", content, start + 8), 16
        size = size or end - start
        if size < head or start + size > end:
            raise ValueError(f"its mp4 boxes are damaged at byte {start}; {_REBUILD}")
        yield kind.decode("latin-1"), (start + head, start + size)
        start += size


def _rows(content: bytes, start: int, end: int, *, columns: int = 1) -> np.ndarray:
    """(n, columns) int64 of a table."""
    (count,) = struct.unpack_from(">I", content, start + 4)
    if start + 8 + 4 * count * columns > end:
        raise ValueError(f"a table of its mp4 is cut short; {_REBUILD}")
    values = np.frombuffer(content, ">i4", count * columns, start + 8)
    return values.reshape(count, columns).astype(np.int64)


def _description(content: bytes, start: int, end: int) -> tuple[bytes, tuple[int, int]]:
    (count,) = struct.unpack_from(">I", content, start + 4)
    codec = content[start + 12 : start + 16]
    if count != 1 or codec not in _CODECS:
        raise ValueError(
            f"its codec is {codec.decode('latin-1')!r} ({count} of them), and only H.264, HEVC and VP9 "
            f"({', '.join(one.decode() for one in _CODECS)}) can be read by frame number; {_REBUILD}"
        )
    entry = start + 8
    (entry_bytes,) = struct.unpack_from(">I", content, entry)
    for kind, (body, _) in _boxes(content, entry + 86, min(entry + entry_bytes, end)):  # behind the fixed fields
        if kind == "pasp" and len(set(struct.unpack_from(">II", content, body))) > 1:
            raise ValueError(f"its pixels are not square; {_REBUILD}")
    width, height = struct.unpack_from(">HH", content, entry + 32)
    return content[start - 8 : end], (width, height)


def _samples(content: bytes, boxes: dict[str, tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Where each sample is, and how many bytes it has."""
    start, end = boxes["stsz"]
    size, count = struct.unpack_from(">II", content, start + 4)
    if count == 0 or count > len(content):
        raise ValueError(f"its mp4 lists {count} frames (is it a fragmented one?); {_REBUILD}")
    sizes = np.full(count, size, np.int64) if size else _rows(content, start + 4, end)[:, 0]
    if "stco" in boxes:
        chunks = _rows(content, *boxes["stco"])[:, 0] & 0xFFFFFFFF  # unsigned, read as signed
    else:
        pairs = _rows(content, boxes["co64"][0], boxes["co64"][1], columns=2)
        chunks = (pairs[:, 0] << 32) + (pairs[:, 1] & 0xFFFFFFFF)
    runs = _rows(content, *boxes["stsc"], columns=3)
    bounds = np.append(runs[:, 0] - 1, len(chunks))
    if bounds[0] != 0 or (np.diff(bounds) < 0).any() or (runs[:, 1] < 1).any():
        raise ValueError(f"the chunks of its mp4 are in disorder; {_REBUILD}")
    per_chunk = np.repeat(runs[:, 1], np.diff(bounds))
    if per_chunk.sum() != count:
        raise ValueError(f"its mp4 has {count} frames in chunks for {per_chunk.sum()}; {_REBUILD}")
    before = np.cumsum(sizes) - sizes
    firsts = np.cumsum(per_chunk) - per_chunk
    offsets = np.repeat(chunks - before[firsts], per_chunk) + before
    if (sizes < 1).any() or (offsets < 0).any() or (offsets + sizes > len(content)).any():
        raise ValueError(f"its mp4 says that frames lie past its {len(content)} bytes; {_REBUILD}")
    return offsets, sizes


def _times(content: bytes, boxes: dict[str, tuple[int, int]], count: int) -> np.ndarray:
    """When each sample is shown, in ticks."""
    steps = _spread(_rows(content, *boxes["stts"], columns=2), count)
    times = np.cumsum(steps) - steps
    if "ctts" in boxes:
        times += _spread(_rows(content, *boxes["ctts"], columns=2), count)
    return times


def _spread(runs: np.ndarray, count: int) -> np.ndarray:
    if (runs[:, 0] < 0).any() or runs[:, 0].sum() != count:
        raise ValueError(f"its mp4 says times of {runs[:, 0].sum()} frames and has {count}; {_REBUILD}")
    return np.repeat(runs[:, 1], runs[:, 0])


def _check_groups(keys: np.ndarray, ranks: np.ndarray) -> None:
    if len(keys) == 0 or keys[0] != 0 or (np.diff(keys) < 1).any() or keys[-1] >= len(ranks):
        raise ValueError(f"its first frame is no key frame, or the list of them is in disorder; {_REBUILD}")
    # With the key frame first in each group, and nothing in a group shown before it, groups are shown one by one.
    if (ranks[keys] != keys).any() or (np.minimum.reduceat(ranks, keys) != keys).any():
        raise ValueError(f"its groups of pictures are open: frames after a key frame are shown before it; {_REBUILD}")


def _check_keys(content: bytes, description: bytes, offsets: np.ndarray, sizes: np.ndarray) -> None:
    """The list of key frames is the encoder's word; what a clip starts with has to be one."""
    codec, (entry_bytes,) = description[20:24], struct.unpack_from(">I", description, 16)
    boxes = dict(_boxes(description, 16 + 86, min(16 + entry_bytes, len(description))))
    length_bytes = 0
    if codec != b"vp09":
        place = boxes["avcC"][0] + 4 if codec == b"avc1" else boxes["hvcC"][0] + 21
        length_bytes = (description[place] & 3) + 1
    for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        if not stands_alone(content[offset : offset + size], codec=codec, length_bytes=length_bytes):
            raise ValueError(f"some of its key frames need pictures before them, as in live video; {_REBUILD}")


def _rate(seconds: np.ndarray, single: float) -> float:
    if len(seconds) == 1:
        return single
    fps = (len(seconds) - 1) / seconds[-1] if seconds[-1] > 0 else 0.0
    if fps == 0 or np.abs(seconds - np.arange(len(seconds)) / fps).max() > _MAX_OFF_SECONDS:
        raise ValueError(f"its rate is not constant (about {fps:.3f} frames per second); {_REBUILD}")
    return round(float(fps), 9)


def _scale(content: bytes, start: int, end: int) -> int:
    """Ticks per second of a media or movie header."""
    (scale,) = struct.unpack_from(">I", content, start + (20 if content[start] == 1 else 12))
    if scale == 0:
        raise ValueError(f"its mp4 has a clock of 0 ticks per second; {_REBUILD}")
    return scale


def _check_edits(content: bytes, boxes: dict[str, tuple[int, int]], *, first: int, last: int, movie: float) -> None:
    """Nothing but the usual single edit that starts at the first picture; `movie`: movie ticks per tick."""
    if "elst" not in boxes:
        return
    start, _ = boxes["elst"]
    (count,) = struct.unpack_from(">I", content, start + 4)
    span, begin = struct.unpack_from(">Qq" if content[start] == 1 else ">Ii", content, start + 8)
    # A span of 0 is open; one that ends before the last picture hides it.
    if count != 1 or begin != first or (span and span <= (last - first) * movie):
        raise ValueError(f"an edit list hides or delays frames ({count} edits, one from tick {begin}); {_REBUILD}")


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _full(kind: bytes, *parts: bytes, flags: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", flags), *parts)


def _table(kind: bytes, rows: Sequence[Sequence[int]] | Sequence[int] | np.ndarray) -> bytes:
    values = np.asarray(rows)
    return _full(kind, struct.pack(">I", len(values)), values.astype(">i4").tobytes())
