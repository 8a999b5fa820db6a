import subprocess
import sys
from io import BytesIO

import av
import numpy as np
import pytest
import torch
from data.numbered import HEIGHT, WIDTH, encode_numbered, read_numbers

from re2tal.data.contract.mp4 import read_mp4
from re2tal.data.streaming.decode import DECODERS, DecodeError, check_decoder, count_frames, decode_frames, decode_parts


def is_there(name: str) -> bool:
    try:
        check_decoder(name)
    except ValueError:
        return False
    return True


every_decoder = pytest.mark.parametrize(
    "decoder",
    [pytest.param(name, marks=pytest.mark.skipif(not is_there(name), reason="not installed")) for name in DECODERS],
)


@pytest.fixture(scope="module")
def video() -> bytes:
    return encode_numbered(300)


@every_decoder
@pytest.mark.parametrize(
    "indices",
    [
        list(range(300)),
        [0, 37, 63, 64, 65, 127, 128, 191, 255, 299],
        [299, 0, 150, 64],
        [5, 5, 6, 6, 6],
        [298],
    ],
    ids=["all", "across groups", "unsorted", "repeated", "one"],
)
def test_the_frames_asked_for_come_back_in_the_order_asked(video, indices, decoder):
    frames = decode_frames(video, indices, decoder=decoder)
    assert frames.shape == (len(indices), HEIGHT, WIDTH, 3)
    assert read_numbers(frames.numpy()) == indices
    assert torch.equal(frames, decode_frames(*read_mp4(video).cut(indices), decoder=decoder))
    assert (frames.int() - decode_frames(video, indices).int()).abs().max() <= 2  # two versions of FFmpeg


@every_decoder
def test_parts_are_the_whole(video, decoder):
    numbers = np.arange(0, 300, 3)
    parts = list(decode_parts(video, numbers, frame_bytes=(4 << 20) // 7, decoder=decoder))
    assert [len(part) for part in parts] == [7] * 14 + [2]
    assert torch.equal(torch.cat(parts), decode_frames(video, numbers))


def coloured(matrix: int, *, full: bool) -> bytes:
    """Three frames of two strong colours, in a file that names its matrix and range."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"qp": "4"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p" if full else "yuv420p"
        stream.codec_context.color_range, stream.codec_context.colorspace = 1 + full, matrix
        pixels = np.full((64, 96, 3), (20, 90, 230), np.uint8)
        pixels[:, :48] = 200, 30, 40
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [1, 2, 4, 6, 7, 9])
def test_colours_are_those_of_decord_whatever_matrix_a_copied_file_names(matrix, full):
    mp4 = coloured(matrix, full=full)
    one, other = (decode_frames(mp4, [0, 2], decoder=decoder) for decoder in ("decord", "pyav"))
    assert torch.equal(one, other)


def test_frames_are_counted(video):
    assert count_frames(video) == 300


def test_frames_outlive_the_reader_they_came_from(video):
    kept = [decode_frames(video, [start, start + 9]) for start in range(0, 200, 20)]
    assert [read_numbers(frames.numpy()) for frames in kept] == [[s, s + 9] for s in range(0, 200, 20)]


@every_decoder
@pytest.mark.parametrize("bad", [b"", b"not a video at all" * 100], ids=["empty", "text"])
def test_bytes_that_are_no_video_are_refused(bad, decoder):
    with pytest.raises(DecodeError, match=f"{len(bad)} bytes do not open as a video"):
        count_frames(bad)
    with pytest.raises(DecodeError, match=f"{len(bad)} bytes do not open as a video"):
        decode_frames(bad, [0], decoder=decoder)


@every_decoder
def test_a_video_with_a_hole_is_refused_when_the_hole_is_read(video, decoder):
    end = video.index(b"moov") - 4
    start = end // 2
    broken = video[:start] + bytes(end - start) + video[end:]
    assert count_frames(broken) == 300
    with pytest.raises(DecodeError, match=r"a frame between 0 and 290 cannot be decoded: "):
        decode_frames(broken, list(range(0, 300, 10)), decoder=decoder)
    with pytest.raises(DecodeError, match=r"a frame between 0 and 290 cannot be decoded: "):
        list(decode_parts(broken, np.arange(0, 300, 10), frame_bytes=1 << 20, decoder=decoder))


@every_decoder
@pytest.mark.parametrize("indices", [[0, 300], [-1, 4]])
def test_a_frame_outside_the_video_is_refused(video, indices, decoder):
    with pytest.raises(ValueError, match="video with 300 frames"):
        decode_frames(video, indices, decoder=decoder)


def test_an_empty_request_is_refused(video):
    with pytest.raises(ValueError, match="non-empty list of frame numbers"):
        decode_frames(video, [])


def test_a_decoder_that_is_unknown_or_not_there_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"data.decoder is 'opencv'; known: decord, pyav, torchcodec"):
        check_decoder("opencv")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match=r"data.decoder is torchcodec, which cannot be loaded .*re2tal\[torchcodec\]"):
        check_decoder("torchcodec")


def test_decord_leaves_pyav_its_own_libraries() -> None:
    """libvpx of both has the same symbols: the first that is loaded serves both."""
    code = """
import io
import re2tal.data.streaming.decode
import av
with av.open(io.BytesIO(), "w", format="webm") as file:
    stream = file.add_stream("libvpx-vp9", rate=30)
    stream.width = stream.height = 64
    file.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
    file.mux(stream.encode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
