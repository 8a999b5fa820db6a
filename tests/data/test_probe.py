import struct
from fractions import Fraction
from pathlib import Path
from uuid import UUID

import av
import pytest
from data.files import cut_short, cut_without_decoding, write_sound, write_video

from re2tal.data.building.probe import open_video, probe_video


def test_a_plain_video_is_described(tmp_path):
    probe = probe_video(write_video(tmp_path / "v.mp4", rate=Fraction(30000, 1001), sound=True))
    assert (probe.codec, probe.num_frames, probe.width, probe.height) == ("h264", 60, 64, 48)
    assert float(probe.duration_seconds) == pytest.approx(60 * 1001 / 30000, abs=1e-4)


def test_width_and_height_are_those_that_a_player_shows(tmp_path):
    turned = probe_video(write_video(tmp_path / "turned.mp4", rotation=90))
    assert (turned.width, turned.height, turned.orientation.swapped) == (48, 64, True)
    wide = probe_video(write_video(tmp_path / "wide.mp4", sample_aspect=Fraction(2)))
    assert (wide.width, wide.height, wide.orientation.swapped) == (128, 48, False)


def test_a_variable_rate_lasts_as_long_as_its_last_frame_says(tmp_path):
    milliseconds = [33 * i for i in range(30)] + [1000 + 100 * i for i in range(30)]
    probe = probe_video(write_video(tmp_path / "v.mp4", milliseconds=milliseconds))
    assert float(probe.duration_seconds) == pytest.approx(4.0, abs=0.11)


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path):
    source = write_video(tmp_path / "whole.mp4", num_frames=300, options={"g": "250"})
    probe = probe_video(cut_without_decoding(source, tmp_path / "cut.mp4", start_seconds=4))
    assert (probe.num_frames, float(probe.duration_seconds)) == (180, pytest.approx(6.0))


def test_what_an_edit_list_trims_is_not_missing(tmp_path):
    path = write_video(tmp_path / "v.mp4", options={"bf": "0"})
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12  # version and flags, number of edits
    assert struct.unpack_from(">Ii", content, place) == (2000, 0)
    struct.pack_into(">I", content, place, 1000)
    path.write_bytes(content)
    probe = probe_video(path)
    assert (probe.num_missing, float(probe.duration_seconds)) == (0, pytest.approx(1.0, abs=0.04))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("not a video\n" * 100)


def _half(path: Path) -> None:
    whole = write_video(path.with_name("whole.mp4"), num_frames=300, container_options={"movflags": "faststart"})
    cut_short(whole, path, share=0.6)


def _half_flash(path: Path) -> None:
    cut_short(write_video(path.with_name("whole.flv"), codec="flv"), path, share=0.5)


def _half_wmv(path: Path) -> None:
    cut_short(write_video(path.with_name("whole.wmv"), codec="wmv2"), path, share=0.5)


def _half_ogg(path: Path) -> None:
    cut_short(write_video(path.with_name("whole.ogv"), codec="libvpx"), path, share=0.5)


def test_an_ogg_file_that_ends_with_a_page_is_whole(tmp_path):
    assert probe_video(write_video(tmp_path / "v.ogv", codec="libvpx", num_frames=10)).num_missing == 0


def test_a_frame_of_a_broadcast_that_repeats_a_field_leaves_no_gap(tmp_path):
    fields = [2 + (number % 40 == 0) for number in range(100)]
    milliseconds = [sum(fields[:number]) * 1001 // 60 for number in range(100)]
    probe = probe_video(write_video(tmp_path / "v.ts", num_frames=100, milliseconds=milliseconds, options={"bf": "0"}))
    assert probe.num_missing == 0
    del milliseconds[30]
    probe = probe_video(write_video(tmp_path / "w.ts", num_frames=99, milliseconds=milliseconds, options={"bf": "0"}))
    assert probe.num_missing == 1


@pytest.mark.parametrize("last", [99, 100])
def test_a_frame_that_a_film_in_a_broadcast_lost_is_missing(tmp_path, last):
    fields = [3 - number % 2 for number in range(last)]
    milliseconds = [sum(fields[:number]) * 1001 // 60 for number in range(last)]
    del milliseconds[30:32]
    path = write_video(tmp_path / "v.ts", num_frames=last - 2, milliseconds=milliseconds, options={"bf": "0"})
    assert probe_video(path, max_missing=0.1).num_missing == 2


@pytest.mark.parametrize("late", [0, 1500])
def test_frames_have_a_rate_where_their_number_tells_their_time(tmp_path, late):
    milliseconds = [round(1000 * number / 25) for number in range(40)]
    path = write_video(tmp_path / "v.mkv", num_frames=40, milliseconds=[late + one for one in milliseconds], sound=True)
    assert probe_video(path).rate == (None if late else pytest.approx(25.0, rel=1e-3))
    uneven = milliseconds[:20] + [milliseconds[20] + 3 * (one - milliseconds[20]) for one in milliseconds[20:]]
    assert probe_video(write_video(tmp_path / "u.mp4", num_frames=40, milliseconds=uneven)).rate is None


def test_the_size_in_the_header_of_a_live_wmv_tells_nothing(tmp_path):
    path = write_video(tmp_path / "v.wmv", codec="wmv2")
    content = bytearray(path.read_bytes())
    place = content.index(UUID("8cabdca1-a947-11cf-8ee4-00c00c205365").bytes_le)
    content[place + 40 : place + 48] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is cut short"):
        probe_video(path)
    content[place + 88] |= 1
    path.write_bytes(content)
    assert probe_video(path).num_missing == 0


def _no_index(path: Path) -> None:
    cut_short(write_video(path.with_name("whole.mp4")), path, share=0.5)


def _no_frames(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


def _nothing(path: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_nothing, "is not a file; check the path"),
        (_empty, "is empty; download or copy it again"),
        (_text, "cannot be read as a video: Invalid data"),
        (write_sound, "has no video stream, only audio"),
        (_half, r"is cut short: its header promises 300 frames, \d+ are there"),
        (_half_flash, r"is cut short or has holes: its times are of \d+ frames, \d+ are there"),
        (_half_ogg, "is cut short: its last page of Ogg is not whole"),
        (_half_wmv, r"is cut short or has holes: its times are of \d+ frames, \d+ are there"),
        (_no_index, "cannot be read as a video"),
        (_no_frames, "without frames|no video stream|cannot be read"),
    ],
)
def test_an_unsound_file_is_named_with_its_fault(tmp_path, write, message):
    path = tmp_path / "v.mp4"
    write(path)
    with pytest.raises(ValueError, match=rf"v\.mp4.*({message})"):
        probe_video(path)


@pytest.mark.parametrize(
    "script",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile secret.mp4\n",
    ],
)
def test_a_playlist_called_mp4_does_not_make_us_read_other_files(tmp_path, script):
    write_video(tmp_path / "secret.mp4")
    (tmp_path / "v.mp4").write_text(script)
    with pytest.raises(ValueError, match=r"v\.mp4 cannot be read as a video"):
        probe_video(tmp_path / "v.mp4")


def test_an_error_while_reading_on_names_the_file(tmp_path):
    path = write_video(tmp_path / "v.mp4")
    with pytest.raises(ValueError, match=r"v\.mp4 cannot be read as a video"), open_video(path):
        raise av.InvalidDataError(1, "damaged")
