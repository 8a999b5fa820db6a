import pytest
from data.numbered import HEIGHT, WIDTH, encode_numbered, read_numbers

from re2tal.data.streaming.decode import DecodeError, count_frames, decode_frames


@pytest.fixture(scope="module")
def video() -> bytes:
    return encode_numbered(300)


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
def test_the_frames_asked_for_come_back_in_the_order_asked(video, indices):
    frames = decode_frames(video, indices)
    assert frames.shape == (len(indices), HEIGHT, WIDTH, 3)
    assert read_numbers(frames.numpy()) == indices


def test_frames_are_counted(video):
    assert count_frames(video) == 300


def test_frames_outlive_the_reader_they_came_from(video):
    kept = [decode_frames(video, [start, start + 9]) for start in range(0, 200, 20)]
    assert [read_numbers(frames.numpy()) for frames in kept] == [[s, s + 9] for s in range(0, 200, 20)]


@pytest.mark.parametrize("bad", [b"", b"not a video at all" * 100], ids=["empty", "text"])
def test_bytes_that_are_no_video_are_refused(bad):
    with pytest.raises(DecodeError, match=f"{len(bad)} bytes do not open as a video"):
        count_frames(bad)


def test_a_video_with_a_hole_is_refused_when_the_hole_is_read(video):
    end = video.index(b"moov") - 4
    start = end // 2
    broken = video[:start] + bytes(end - start) + video[end:]
    assert count_frames(broken) == 300
    with pytest.raises(DecodeError, match=r"a frame between 0 and 290 cannot be decoded: "):
        decode_frames(broken, list(range(0, 300, 10)))


@pytest.mark.parametrize("indices", [[0, 300], [-1, 4]])
def test_a_frame_outside_the_video_is_refused(video, indices):
    with pytest.raises(ValueError, match="video with 300 frames"):
        decode_frames(video, indices)


def test_an_empty_request_is_refused(video):
    with pytest.raises(ValueError, match="non-empty list of frame numbers"):
        decode_frames(video, [])
