"""Which files decord can be trusted with, judged by the numbers in their pictures; and cutting groups out of them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from data.files import cut_without_decoding, write_video
from data.numbered import encode_numbered, read_numbers

from re2tal.data.contract.mp4 import read_mp4
from re2tal.data.streaming.decode import decode_frames

OPEN = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0:keyint=12:min-keyint=12"}
CLOSED = {"g": "12", "bf": "3", "x264-params": "open-gop=0:scenecut=0"}
REFRESH = {"g": "12", "bf": "0", "x264-params": "intra-refresh=1"}
RATE = Fraction(30000, 1001)

X265 = {"x265-params": "log-level=none:keyint=20:open-gop=1"}
FOREIGN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "MPEG-4 with B-frames": (
        lambda path: write_video(path, codec="mpeg4", options={"bf": "2", "g": "12"}),
        r"codec is 'mp4v' .* only H\.264",
    ),
    "HEVC in open groups": (lambda path: write_video(path, codec="libx265", options=X265), "of pictures are open"),
    "AV1": (lambda path: write_video(path, codec="libsvtav1", options={"preset": "12"}), "codec is 'av01'"),
    "a gradual refresh": (lambda path: write_video(path, options=REFRESH), "key frames need pictures before them"),
    "open groups": (lambda path: write_video(path, options=OPEN), "groups of pictures are open"),
    "a rate that varies": (
        lambda path: write_video(path, milliseconds=[40 * n + 9 * (n % 3) for n in range(60)]),
        "rate is not constant",
    ),
    "a late start": (lambda path: write_video(path, start=12), "edit list hides or delays"),
    "an edit list": (
        lambda path: cut_without_decoding(
            write_video(path.with_name("whole.mp4"), options=CLOSED), path, start_seconds=1
        ),
        "edit list hides or delays|first frame is no key frame",
    ),
    "turned": (lambda path: write_video(path, rotation=90), "turned or mirrored"),
    "pixels that are not square": (lambda path: write_video(path, sample_aspect=Fraction(4, 3)), "not square"),
    "fragments": (
        lambda path: write_video(path, container_options={"movflags": "frag_keyframe+empty_moov"}),
        "lists 0 frames",
    ),
    "Matroska": (lambda path: write_video(path.with_suffix(".mkv")), "boxes are damaged|no moov"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_decord_may_number_wrong_is_refused(kind, tmp_path):
    make, message = FOREIGN[kind]
    with pytest.raises(ValueError, match=message):
        read_mp4(make(tmp_path / "a.mp4").read_bytes())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"options": CLOSED},
        {"options": {"bf": "0"}},
        {"rate": RATE},
        {"sound": True},
        {"container_options": {"movflags": "+faststart"}},
        {"container_options": {"use_editlist": "0"}},
        {"milliseconds": [round(1000 * n / 30) for n in range(60)]},
    ],
    ids=["plain", "B-frames", "no B-frames", "29.97", "sound", "tables first", "no edit list", "milliseconds"],
)
def test_what_is_accepted_is_numbered_right(options, tmp_path):
    content = write_video(tmp_path / "a.mp4", **options).read_bytes()
    mp4 = read_mp4(content)
    assert mp4.num_frames == 60
    assert mp4.fps == pytest.approx(float(options.get("rate", 30)), rel=1e-3)
    for wanted in (list(range(60)), [59, 13, 13, 0], [25]):
        assert read_numbers(decode_frames(content, wanted).numpy()) == wanted
        assert read_numbers(decode_frames(*mp4.cut(wanted)).numpy()) == wanted


@pytest.mark.parametrize("wanted", [[0], [63], [64], [299, 5], [70, 71, 200], list(range(0, 300, 7))])
def test_a_cut_decodes_to_the_very_pictures_of_the_whole(wanted):
    content = encode_numbered(300)
    cut, places = read_mp4(content).cut(wanted)
    assert np.array_equal(decode_frames(cut, places).numpy(), decode_frames(content, wanted).numpy())
    assert len(cut) < len(content) or wanted[-1] == 294
    assert read_mp4(cut).num_frames == 64 * len({n // 64 for n in wanted}) - 20 * any(n >= 256 for n in wanted)


def test_a_frame_outside_of_the_video_is_refused():
    with pytest.raises(ValueError, match=r"frames \[30\] asked of a video with 30 frames"):
        read_mp4(encode_numbered(30)).cut([30])


@pytest.mark.parametrize("kind", ["stts", "ctts", "stss", "stsc", "stsz", "stco", "elst", "mdhd", "avc1", "moov"])
def test_tables_of_nonsense_are_refused_and_take_no_memory(kind):
    """Every field of a table in turn says the largest number there is."""
    content = encode_numbered(70)
    start = content.index(kind.encode()) + 4
    for place in range(start, min(start + 40, len(content) - 4), 4):
        changed = content[:place] + struct.pack(">I", 0xFFFFFFFF) + content[place + 4 :]
        try:
            mp4 = read_mp4(changed)
        except ValueError:
            continue
        assert mp4.num_frames == 70
