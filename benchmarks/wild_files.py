"""Odd but sound files for `wild.py`: they show their number and known colours."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

os.environ.setdefault("SVT_LOG", "1")  # its encoder greets each time
WIDTH, HEIGHT, BLOCK, BITS = 160, 120, 24, 12
COLOURS = ((200, 120, 80), (30, 160, 140), (60, 60, 200), (230, 220, 40))
MAX_LEVELS = 3
NTSC = Fraction(30000, 1001)
FAST = {"deadline": "realtime", "cpu-used": "8"}
BEST = {"crf": "4", "b:v": "0", **FAST}
X265 = "log-level=none:keyint={}:{}"


@dataclass(frozen=True)
class Odd:
    """How an odd file is made."""

    codec: str
    options: dict[str, str] = field(default_factory=dict)
    rate: Fraction = Fraction(30)
    milliseconds: Sequence[int] | None = None
    """When each frame is shown, instead of at a rate."""
    num_frames: int = 48
    start: int = 0
    """Frames by which the pictures begin after the sound."""
    sound: bool = False
    size: tuple[int, int] = (WIDTH, HEIGHT)
    pix_fmt: str = "yuv420p"
    aspect: Fraction | None = None
    full_range: bool = False
    is_709: bool = False
    upside_down: bool = False
    container: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    """Frames that an edit list hides, as a cut without decoding leaves them."""


def _odd() -> Iterator[tuple[str, Odd]]:
    x264 = {"g": "24", "crf": "4", "preset": "veryfast"}
    mpeg = {"qmin": "1", "qmax": "2", "g": "12"}
    x265 = {"x265-params": X265.format(24, "open-gop=1:crf=4"), "preset": "veryfast"}
    plain = {
        "h264": (("mp4", "mkv", "mov", "ts", "flv", "avi", "3gp", "m4v"), "libx264", x264),
        "hevc": (("mp4", "mkv", "ts"), "libx265", x265),
        "vp8": (("webm", "mkv"), "libvpx", {"b:v": "6M", **FAST}),
        "vp9": (("webm", "mkv", "mp4"), "libvpx-vp9", BEST),
        "av1": (("mp4", "mkv", "webm"), "libsvtav1", {"crf": "8", "preset": "10"}),
        "mpeg4": (("avi", "mp4", "mkv"), "mpeg4", mpeg),
        "mjpeg": (("avi", "mov", "mkv"), "mjpeg", {"qmin": "1", "qmax": "1"}),
        "wmv": (("wmv",), "wmv2", {"qmin": "1", "qmax": "2", "g": "12"}),
    }
    for name, (suffixes, codec, options) in plain.items():
        pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for suffix in suffixes:
            for rate in (Fraction(30), Fraction(25), Fraction(24000, 1001), Fraction(12)):
                text = str(rate).replace("/", "_")
                yield f"{name}-{text}.{suffix}", Odd(codec, options, rate, pix_fmt=pix_fmt, full_range=codec == "mjpeg")
    for suffix in ("mpg", "ts"):
        for rate in (Fraction(25), NTSC):
            yield f"mpeg2-{rate.numerator}.{suffix}", Odd("mpeg2video", {**mpeg, "bf": "2"}, rate)
    wild = [(33 * k + 100 * (k // 7)) for k in range(48)]
    for suffix in ("mp4", "mkv", "mov"):
        yield f"varies.{suffix}", Odd("libx264", x264, milliseconds=wild)
        yield f"late.{suffix}", Odd("libx264", x264, start=18, sound=True)
        yield f"sound.{suffix}", Odd("libx264", x264, sound=True)
        yield f"one.{suffix}", Odd("libx264", x264, num_frames=1)
        yield f"two.{suffix}", Odd("libx264", x264, num_frames=2)
        yield f"bt709.{suffix}", Odd("libx264", x264, is_709=True)
        yield f"full.{suffix}", Odd("libx264", x264, pix_fmt="yuvj420p", full_range=True)
        yield f"full709.{suffix}", Odd("libx264", x264, pix_fmt="yuvj420p", full_range=True, is_709=True)
        yield f"odd444.{suffix}", Odd("libx264", x264, pix_fmt="yuv444p", size=(161, 121))
        yield f"ten.{suffix}", Odd("libx264", x264, pix_fmt="yuv420p10le")
        yield f"wide.{suffix}", Odd("libx264", x264, aspect=Fraction(4, 3))
        yield f"open.{suffix}", Odd("libx264", {**x264, "bf": "3", "x264-params": "open-gop=1"}, num_frames=96)
        yield f"long-groups.{suffix}", Odd("libx264", {**x264, "g": "250", "bf": "3"}, num_frames=96)
    for suffix in ("mp4", "mov"):
        yield f"cut.{suffix}", Odd("libx264", {**x264, "g": "60"}, num_frames=90, cut=20)
        yield f"turned.{suffix}", Odd("libx264", x264, upside_down=True)
    yield "fragments.mp4", Odd("libx264", x264, container={"movflags": "frag_keyframe+empty_moov"})
    yield "reordered.avi", Odd("mpeg4", {**mpeg, "bf": "2"})
    yield "ffv1.mkv", Odd("ffv1")
    yield "rgb.mkv", Odd("libx264rgb", {"crf": "4"}, pix_fmt="rgb24")
    yield "prores.mov", Odd("prores_ks", pix_fmt="yuv422p10le")
    yield "interlaced.ts", Odd("mpeg2video", {**mpeg, "flags": "+ildct+ilme"}, Fraction(25))


ODD = dict(_odd())


@dataclass(frozen=True)
class Shown:
    """What a player shows of a file."""

    fps: float
    times: np.ndarray
    """(N,) seconds on a player's clock"""
    numbers: np.ndarray
    """(N,) the number that each frame shows"""
    cells: np.ndarray
    """(N, 16, 16, 3) means of the picture's cells"""

    colours: np.ndarray = field(default_factory=lambda: np.array(COLOURS))
    """(4, 3) RGB levels of the patches"""

    def wrong_colours(self, pictures: np.ndarray) -> int:
        """Pictures whose patches are further than MAX_LEVELS from these."""
        return int((np.abs(patches(pictures) - self.colours).max((1, 2)) > MAX_LEVELS).sum())


def patches(pictures: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) -> (T, 4, 3) levels of the coloured patches."""
    height, width = pictures.shape[1:3]
    column = pictures[:, :, int(0.78 * width) : int(0.95 * width)]
    rows = [slice((8 * k + 3) * height // 32, (8 * k + 6) * height // 32) for k in range(len(COLOURS))]
    return np.stack([np.median(column[:, one], (1, 2)) for one in rows], 1)


def picture(number: int) -> np.ndarray:
    """(HEIGHT, WIDTH, 3): bit k of the number is block k; colours on the right."""
    canvas = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    bits = (number >> np.arange(BITS)) & 1
    blocks = np.kron(bits.reshape(3, 4), np.ones((BLOCK, BLOCK))) * 255
    canvas[8 : 8 + 3 * BLOCK, 8 : 8 + 4 * BLOCK] = blocks[:, :, None]
    for k, colour in enumerate(COLOURS):
        canvas[30 * k : 30 * k + 30, 112:] = colour
    return canvas


def numbers_in(pictures: np.ndarray) -> list[int]:
    """(T, H, W, 3) -> the number in each."""
    height, width = pictures.shape[1:3]
    rows = ((8 + BLOCK * (np.arange(3) + 0.5)) * height / HEIGHT).astype(int)
    columns = ((8 + BLOCK * (np.arange(4) + 0.5)) * width / WIDTH).astype(int)
    bits = pictures[:, rows][:, :, columns].mean(-1) > 127
    return (bits.reshape(len(pictures), BITS) * (1 << np.arange(BITS))).sum(1).tolist()


def write_odd(path: Path, odd: Odd) -> Shown:
    """Write the file; gives what was drawn, and when."""
    whole = path.with_name(f"whole-{path.name}") if odd.cut else path
    with av.open(str(whole), "w", options=odd.container) as container:
        stream = container.add_stream(odd.codec, rate=odd.rate, options=odd.options)
        (stream.width, stream.height), stream.pix_fmt = odd.size, odd.pix_fmt
        context = stream.codec_context
        context.time_base = Fraction(1, 1000) if odd.milliseconds else 1 / odd.rate
        if odd.aspect:
            context.sample_aspect_ratio = odd.aspect
        if odd.full_range or odd.is_709:
            context.color_range = ColorRange.JPEG if odd.full_range else ColorRange.MPEG
            context.colorspace = 1 if odd.is_709 else 5
        if odd.upside_down:
            stream.set_display_rotation(180)
        sound = container.add_stream("aac", rate=16000) if odd.sound else None
        for number in range(odd.num_frames):
            frame = _frame(number, odd)
            frame.pts = odd.milliseconds[number] if odd.milliseconds else odd.start + number
            frame.time_base = context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            for block in range(int((odd.start + odd.num_frames) / odd.rate * 16000) // 1024 + 1):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, 1024 * block
                container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    if odd.cut:
        _cut(whole, path, odd.cut / odd.rate)
    numbers = np.arange(odd.cut, odd.num_frames)
    ticks = [odd.milliseconds[k] / 1000 if odd.milliseconds else float((odd.start + k) / odd.rate) for k in numbers]
    times = np.array(ticks) - (float(odd.cut / odd.rate))
    seen = _seen(path, odd)
    numbers = np.array(numbers_in(seen)) if len(seen) == len(numbers) else numbers  # an encoder may err too
    return Shown(float(odd.rate), times, numbers, np.zeros(0), patches(seen)[0])


def _seen(path: Path, odd: Odd) -> np.ndarray:
    """(T, H, W, 3) of a file by PyAV."""
    matrix = Colorspace.ITU709 if odd.is_709 else Colorspace.ITU601
    with av.open(str(path)) as container:
        frames = [frame.reformat(format="rgb24", src_colorspace=matrix) for frame in container.decode(video=0)]
    seen = np.stack([frame.to_ndarray() for frame in frames])
    return seen[:, ::-1, ::-1] if odd.upside_down else seen


def _frame(number: int, odd: Odd) -> av.VideoFrame:
    """The picture in the format that is encoded, by the matrix and range that the file names."""
    drawn = picture(number)[::-1, ::-1] if odd.upside_down else picture(number)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(drawn), format="rgb24")
    if odd.pix_fmt == "rgb24":
        return frame
    levels = ColorRange.JPEG if odd.full_range else ColorRange.MPEG
    matrix = Colorspace.ITU709 if odd.is_709 else Colorspace.ITU601
    width, height = odd.size
    made = frame.reformat(width, height, odd.pix_fmt, dst_colorspace=matrix, dst_color_range=levels)
    if odd.full_range or odd.is_709:
        made.color_range, made.colorspace = levels, 1 if odd.is_709 else 5
    return made


def _cut(source: Path, target: Path, seconds: Fraction) -> None:
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        shift = int(seconds / stream.time_base)
        for packet in read.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                written.mux(packet)
