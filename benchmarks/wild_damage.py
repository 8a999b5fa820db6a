"""Sound files of each codec for `wild.py`, and damaged copies of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from wild_files import FAST, HEIGHT, WIDTH, X265, Shown

from re2tal.data.building.check import small

# name -> (codec, options); the suffix is the container
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", {"g": "30"}),
    "h264cavlc.mp4": ("libx264", {"g": "30", "profile": "baseline"}),
    "h264.mkv": ("libx264", {"g": "30"}),
    "h264.ts": ("libx264", {"g": "30"}),
    "hevc.mp4": ("libx265", {"x265-params": X265.format(30, "open-gop=0")}),
    "hevc.mkv": ("libx265", {"x265-params": X265.format(30, "open-gop=1")}),
    "hevc.ts": ("libx265", {"x265-params": X265.format(30, "open-gop=0")}),
    "vp8.webm": ("libvpx", {"g": "30", "b:v": "600k", **FAST}),
    "vp8.mkv": ("libvpx", {"g": "30", "b:v": "600k", **FAST}),
    "vp9.webm": ("libvpx-vp9", {"g": "30", "b:v": "600k", **FAST}),
    "vp9.mp4": ("libvpx-vp9", {"g": "30", "b:v": "600k", **FAST}),
    "av1.mp4": ("libsvtav1", {"g": "30", "preset": "12"}),
    "av1.webm": ("libsvtav1", {"g": "30", "preset": "12"}),
    "mpeg4.avi": ("mpeg4", {"g": "30", "b:v": "800k"}),
    "mpeg4.mp4": ("mpeg4", {"g": "30", "bf": "2", "b:v": "800k"}),
    "mpeg4.mkv": ("mpeg4", {"g": "30", "b:v": "800k"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "15", "b:v": "1500k"}),
    "mpeg2.ts": ("mpeg2video", {"g": "15", "b:v": "1500k"}),
}


def write_moving(path: Path, name: str, *, content: Path | None = None, num_frames: int = 90) -> Path:
    """A pattern that moves, or the beginning of a real video, as the codec and container called `name`."""
    codec, options = CODECS[name]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number, frame in enumerate(_moving() if content is None else _beginning(content)):
            if number == num_frames:
                break
            frame.pts, frame.time_base = number, Fraction(1, 30)
            frame.pict_type = 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _moving() -> Iterator[av.VideoFrame]:
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    texture = np.kron(noise, np.ones((8, 8, 1), np.uint8))
    for number in range(180):
        part = texture[number : number + HEIGHT, 2 * number : 2 * number + WIDTH]
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(part), format="rgb24")


def _beginning(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.reformat(WIDTH, HEIGHT, "yuv420p")


def decoded(path: Path) -> Shown:
    """What PyAV shows of a sound file."""
    times, cells = [], []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, start = stream.average_rate or Fraction(30), (container.start_time or 0) / av.time_base
        for number, frame in enumerate(container.decode(video=0)):
            times.append(number / float(rate) if path.suffix == ".avi" else frame.time - start)
            cells.append(small(frame.to_ndarray(format="rgb24")))
    return Shown(float(rate), np.array(times), np.arange(len(times)), np.stack(cells))


def mutations(path: Path, *, count: int) -> Iterator[Path]:
    """Damaged copies of a sound file; the same ones each time."""
    kinds = ["zero", "bits", "drop", "noise", "block", "zero", "bits", "drop", "cut"]
    if path.suffix in (".ts", ".mpg"):
        kinds = ["zero", "bits", "lose", "noise", "block", "zero", "bits", "lose", "cut"]
    if "av1" in path.name:  # PyAV copies no packets of it
        kinds = [kind.replace("drop", "noise") for kind in kinds]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        target = path.with_name(f"{path.name}.{kind}.{number}{path.suffix}")
        rng = np.random.default_rng(zlib.crc32(target.name.encode()))
        if kind == "drop":
            _drop(path, target, rng)
        else:
            target.write_bytes(_damaged(path.read_bytes(), kind, rng))
        yield target


def _damaged(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    data = np.frombuffer(content, np.uint8).copy()
    place = int(len(data) * rng.uniform(0.15, 0.9))
    size = min(int(2 ** rng.uniform(6, 12)), len(data) - place)
    match kind:
        case "zero":
            data[place : place + size] = 0
        case "noise":
            data[place : place + size] = rng.integers(0, 256, size)
        case "block":  # a sector of a disk that holds another
            data[place : place + size] = data[place // 2 : place // 2 + size]
        case "bits":
            places = place + rng.integers(0, size, max(1, size // 128))
            data[places] ^= 1 << rng.integers(0, 8, len(places), dtype=np.uint8)
        case "lose":
            first = place // 188 * 188
            data = np.delete(data, slice(first, first + 188 * int(rng.integers(1, 30))))
        case "cut":
            data = data[: int(len(data) * rng.uniform(0.5, 0.97))]
    return data.tobytes()


def _drop(path: Path, target: Path, rng: np.random.Generator) -> None:
    """Packets that are not there, with the times of the others as they were."""
    with av.open(str(path)) as read, av.open(str(target), "w") as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        packets = [packet for packet in read.demux(stream) if packet.size]
        first = int(rng.integers(5, len(packets) - 15))
        gone = range(first, first + int(rng.integers(1, 10)))
        for number, packet in enumerate(packets):
            if number not in gone:
                packet.stream = copy
                written.mux(packet)
