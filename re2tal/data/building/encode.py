"""Normalise a video: any sound file in, one that decord decodes exactly out.

    output frame i  =  the source frame nearest to i / fps seconds on a player's clock

H.264 with closed groups of pictures, constant rate, square upright pixels, no sound, no edit of the source left in the
timing. On other files decord 0.6 returns wrong frames without a word, or never returns (open groups, edit lists,
transport streams, mpeg-4 with B-frames), so this is what makes training data trustworthy, not a matter of size.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.container import OutputContainer
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from re2tal.data.building.check import Normalised, Samples
from re2tal.data.building.pictures import SMPTE_170M, naming, nearest_in_time, scaled
from re2tal.data.building.probe import MAX_DAMAGED, VideoProbe, open_video
from re2tal.data.building.shown import shown_frames
from re2tal.data.contract.manifest import Encoding, FramesPerSecond, FramesPerVideo

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.ENOENT)
"""What writing may meet; everything else comes from the encoder, and concerns this video alone."""


def normalise_video(
    source: Path, target: Path, *, probe: VideoProbe, encoding: Encoding, max_damaged: float = MAX_DAMAGED
) -> Normalised:
    """Write `source` to `target` as an mp4 in the given encoding; the same bytes for the same input and libraries.

    Raises ValueError where more than the share `max_damaged` of the source's frames is damaged or missing.
    """
    rate, num_frames = sampling_grid(probe.duration_seconds, encoding)
    damage = probe.damage
    samples = Samples(rate, num_frames, probe.orientation)
    with open_video(source) as (container, stream):
        shown = samples.taken_from(shown_frames(container, stream, damage))
        frames = nearest_in_time(shown, rate=rate, num_frames=num_frames)
        pictures = scaled(frames, stream, orientation=probe.orientation, short_side=encoding.short_side)
        size = _write(target, naming(source, pictures), rate=rate, encoding=encoding)
    if damage.share > max_damaged or size is None:
        raise ValueError(f"{source} is damaged: {damage}; replace the file, or allow more with --max-damaged")
    return Normalised(num_frames, float(rate), *size, damage, samples.pictures)


def sampling_grid(duration_seconds: Fraction, encoding: Encoding) -> tuple[Fraction, int]:
    """(frames per second, number of frames) to store of a video of this duration."""
    match encoding.sampling:
        case FramesPerSecond(fps):
            # 29.97 becomes 2997/100 and 29.97003 30000/1001: a float's own fraction has terms of 16 digits.
            rate = Fraction(fps).limit_denominator(1001)
            return rate, max(1, round(duration_seconds * rate))
        case FramesPerVideo(num_frames):
            # Rates with small terms fit the 32-bit fields of mp4 and H.264; over half an hour the last frame moves by
            # less than 10 ms.
            return (num_frames / duration_seconds).limit_denominator(100_000), num_frames


def _write(
    target: Path, pictures: Iterator[av.VideoFrame], *, rate: Fraction, encoding: Encoding
) -> tuple[int, int] | None:
    """Encode pictures of one size at a constant rate; gives their (width, height), None where there is no picture."""
    # Without "bitexact" the file would name the library's version.
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    try:
        with av.open(str(target), "w", format="mp4", container_options=options) as container:
            stream = None
            for number, picture in enumerate(pictures):
                stream = stream or _add_stream(container, picture, rate=rate, encoding=encoding)
                picture.pts, picture.time_base = number, 1 / rate
                picture.pict_type = 0  # the source's key frames are not ours
                container.mux(stream.encode(picture))
            if stream is None:
                return None
            container.mux(stream.encode(None))
            return stream.width, stream.height
    except av.FFmpegError as error:
        if error.errno in _DISK:
            raise OSError(f"{target} cannot be written: {error.strerror}; is the disk full?") from None
        raise ValueError(f"its pictures cannot be encoded: {error.strerror}; convert the file") from None


def _add_stream(
    container: OutputContainer, picture: av.VideoFrame, *, rate: Fraction, encoding: Encoding
) -> VideoStream:
    # cpu-independent: without it x264's vector code reads memory that nobody wrote, and 60 encodings of one video gave
    # a dozen different files. With more than one thread the bits would depend on the machine's number of cores.
    x264 = f"keyint={encoding.gop}:min-keyint={encoding.gop}:scenecut=0:open-gop=0:threads=1:cpu-independent=1"
    options = {"preset": encoding.preset, "tune": "fastdecode", "crf": str(encoding.crf), "x264-params": x264}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
    stream.codec_context.time_base = 1 / rate
    # Readers that look at tags and those that don't both take this for what it is: untagged video is BT.601 to FFmpeg.
    stream.codec_context.color_range, stream.codec_context.colorspace = ColorRange.MPEG, SMPTE_170M
    return stream
