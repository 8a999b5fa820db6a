"""Sources whose frames a player shows turned, late, reordered or in other colours; and damaged ones.

What is right is computed here from pixels, levels and times; frames carry their number.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from time import process_time

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from data.files import encoding, write_video
from data.numbered import numbered_frame, read_numbers

from re2tal.data.building import consumption
from re2tal.data.building.check import Normalised, check_normalised
from re2tal.data.building.encode import normalise_video
from re2tal.data.building.probe import open_video, probe_video
from re2tal.data.building.shown import Damage, shown_frames
from re2tal.data.streaming.decode import decode_frames


def stored(source: Path, *, fps: float = 30, max_damaged: float = 0.02) -> tuple[np.ndarray, Normalised]:
    """(T, H, W, 3) as decord reads what is stored of `source`."""
    target = source.with_name("out.mp4")
    probe = probe_video(source, max_missing=max_damaged)
    result = normalise_video(source, target, probe=probe, encoding=encoding(fps=fps), max_damaged=max_damaged)
    check_normalised(target, result)
    return decode_frames(target.read_bytes(), range(result.num_frames)).numpy(), result


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Write the matrix into the header of an mp4's only track: pixel (x, y) is shown at (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 4 + 20 + 16  # version, times and numbers, layer and volume
    one = 1 << 16
    content[place : place + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (-1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, 1, -1, 0),
        (0, -1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_each_of_the_eight_orientations_is_stored_as_a_player_shows_it(tmp_path, matrix):
    number = 0b100101001110  # no symmetry
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width = numbered_frame(number).shape[:2]
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")))
        container.mux(stream.encode(None))
    frames, result = stored(set_display_matrix(tmp_path / "v.mp4", *matrix))
    a, b, c, d = matrix
    picture = numbered_frame(number)
    height, width = picture.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    across, down = a * columns + c * rows, b * columns + d * rows
    wanted = np.zeros((height, width, 3) if a else (width, height, 3))
    wanted[down - down.min(), across - across.min()] = picture
    places = [np.linspace(8, side - 9, 7).round().astype(int) for side in wanted.shape[:2]]
    assert result.height == wanted.shape[0]
    scale = result.width / wanted.shape[1]  # a width of 48, which decord refuses, is stored as 50
    shown = frames[1][places[0]][:, (places[1] * scale).round().astype(int)]
    assert np.mean(abs(shown.astype(int) - wanted[places[0]][:, places[1]]) < 40) > 0.9


LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
"""Weights of red and blue in the two matrices (ITU-R BT.601 and BT.709)."""


def write_colour(path: Path, rgb: tuple[int, int, int], *, codec: str, pix_fmt: str, matrix: str, full: bool) -> Path:
    """One flat colour, by the formulas of the standards."""
    red_weight, blue_weight = LUMA[matrix]
    red, green, blue = (level / 255 for level in rgb)
    luma = red_weight * red + blue_weight * blue + (1 - red_weight - blue_weight) * green
    chroma = (blue - luma) / (2 - 2 * blue_weight), (red - luma) / (2 - 2 * red_weight)
    scale, offset, chroma_scale = (255, 0, 255) if full else (219, 16, 224)
    levels = [round(offset + scale * luma), *(round(128 + chroma_scale * part) for part in chroma)]
    planes = np.concatenate([np.full(64 * 64, levels[0]), np.full(32 * 32, levels[1]), np.full(32 * 32, levels[2])])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        stream.codec_context.color_range = 2 if full else 1
        if matrix == "bt709":
            stream.codec_context.colorspace = 1
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(planes.astype(np.uint8).reshape(96, 64), format=pix_fmt)
            frame.color_range, frame.colorspace = (2 if full else 1), (1 if matrix == "bt709" else 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("rgb", [(200, 120, 80), (12, 240, 200), (250, 250, 5)])
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "matrix", "full"),
    [
        ("v.mp4", "libx264", "yuv420p", "bt601", False),
        ("v.mp4", "libx264", "yuv420p", "bt709", False),
        ("v.mp4", "libx264", "yuvj420p", "bt601", True),
        ("v.mkv", "libx264", "yuvj420p", "bt709", True),
        ("v.avi", "mjpeg", "yuvj420p", "bt601", True),
    ],
)
def test_colours_are_those_that_a_player_shows(tmp_path, rgb, name, codec, pix_fmt, matrix, full):
    frames, _ = stored(write_colour(tmp_path / name, rgb, codec=codec, pix_fmt=pix_fmt, matrix=matrix, full=full))
    assert np.abs(frames.astype(int) - np.array(rgb)).max() <= 3


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "rgb"),
    [("ffv1", "gray", (100, 100, 100)), ("ffv1", "bgr0", (200, 120, 80)), ("libx264rgb", "rgb24", (12, 240, 200))],
)
def test_pictures_without_chroma_or_in_rgb_keep_their_levels(tmp_path, codec, pix_fmt, rgb):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        for _ in range(3):
            picture = np.full((64, 64, 3), rgb, np.uint8)
            source = picture[:, :, 0] if pix_fmt == "gray" else picture
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(source), format="gray" if pix_fmt == "gray" else "rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frames, _ = stored(tmp_path / "v.mkv")
    assert np.abs(frames.astype(int) - np.array(rgb)).max() <= 3


def test_the_stored_file_says_what_its_levels_mean(tmp_path):
    stored(write_video(tmp_path / "v.mp4"))
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (int(frame.color_range), int(frame.colorspace)) == (1, 6)  # limited, SMPTE 170M: BT.601


def test_pictures_that_begin_after_the_sound_are_at_their_time_on_a_players_clock(tmp_path):
    source = write_video(tmp_path / "v.mp4", num_frames=30, start=24, sound=True)
    assert float(probe_video(source).duration_seconds) == pytest.approx(1.8, abs=0.03)
    frames, _ = stored(source)
    assert read_numbers(frames) == [*[0] * 24, *range(30)], "the first picture is held until the second"


@pytest.mark.parametrize(("codec", "bframes"), [("mpeg4", {"bf": "2"}), ("libx264", {"bf": "3", "g": "30"})])
def test_an_avi_that_reorders_its_frames_is_stored_in_the_order_of_display(tmp_path, codec, bframes):
    frames, result = stored(write_video(tmp_path / "v.avi", num_frames=90, codec=codec, options=bframes))
    assert result.damage.num_damaged == 0
    assert read_numbers(frames) == list(range(90))


def test_an_avi_holds_pictures_where_it_dropped_frames(tmp_path):
    kept = [*range(10), *range(13, 30), *range(34, 60)]
    with av.open(str(tmp_path / "v.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=30, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in kept:
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frames, result = stored(tmp_path / "v.avi")
    assert result.damage.num_damaged == 0
    wanted = [min(kept, key=lambda number, i=i: (abs(number - i), number)) for i in range(60)]
    assert read_numbers(frames) == wanted


def test_an_avi_whose_pictures_come_at_every_twentieth_place_lacks_none(tmp_path):
    """As a copy of an mp4's packets is, whose clock is finer than its rate."""
    source = write_video(tmp_path / "v.mp4", num_frames=60, options={"bf": "3", "g": "30"})
    with av.open(str(source)) as container, av.open(str(tmp_path / "v.avi"), "w") as target:
        stream = container.streams.video[0]
        copy = target.add_stream_from_template(stream)
        lengths_to_codes = BitStreamFilterContext("h264_mp4toannexb", stream, copy)
        for packet in container.demux(stream):
            for one in lengths_to_codes.filter(packet if packet.size else None):
                one.stream = copy
                target.mux(one)
    frames, result = stored(tmp_path / "v.avi")
    assert (result.damage.num_frames, result.damage.num_damaged) == (60, 0)
    assert read_numbers(frames) == list(range(60))


def test_an_avi_whose_header_counts_fields_is_timed_by_its_rate(tmp_path):
    source = write_video(tmp_path / "v.avi", num_frames=60, codec="mpeg4", options={"bf": "0"})
    content = bytearray(source.read_bytes())
    for place in (content.index(b"avih") + 8 + 16, content.index(b"strh") + 8 + 32):
        assert struct.unpack_from("<I", content, place) == (60,)
        struct.pack_into("<I", content, place, 120)
    source.write_bytes(content)
    frames, _ = stored(source)
    assert read_numbers(frames) == list(range(60))


@pytest.mark.parametrize("marked", [True, False])
def test_a_cover_before_the_video_is_not_the_video(tmp_path, marked):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 240, "yuvj420p"
        if marked:
            cover.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((240, 320, 3), np.uint8), format="rgb24")))
        for number in range(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")))
        container.mux(stream.encode(None))
        container.mux(cover.encode(None))
    assert read_numbers(stored(tmp_path / "v.mkv")[0]) == list(range(30))


def test_the_stream_that_is_marked_as_the_default_is_taken(tmp_path):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        streams = []
        for default in (False, True):
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.disposition = av.stream.Disposition.default if default else av.stream.Disposition.dub
            streams.append(stream)
        for number in range(30):
            for stream, shown in zip(streams, (number + 1000, number), strict=True):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(shown), format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    assert read_numbers(stored(tmp_path / "v.mkv")[0]) == list(range(30))


def write_moving(
    path: Path,
    codec: str,
    *,
    num_frames: int = 90,
    pause: int = 0,
    pix_fmt: str = "yuv420p",
    scene: int = 1000,
    **options: str,
) -> Path:
    """A pattern that moves, so that a lost packet shows. Frame 40 comes `pause` frames late, each `scene` is new."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    texture = np.kron(noise, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 160, 120, pix_fmt
        for number in range(num_frames):
            moved = np.roll(texture, 97 * (number // scene), (0, 1))
            picture = np.ascontiguousarray(moved[number : number + 120, 2 * number : 2 * number + 160])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number + pause * (number >= 40), Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def zero(path: Path, *, start: float, num_bytes: int) -> Path:
    """A hole, as a download that was never finished leaves it."""
    content = bytearray(path.read_bytes())
    place = int(len(content) * start)
    content[place : place + num_bytes] = bytes(num_bytes)
    path.write_bytes(content)
    return path


FAST = {"deadline": "realtime", "cpu-used": "8"}
HOLES = {
    "h264.mp4": ("libx264", {"g": "30"}),
    "h264.mkv": ("libx264", {"g": "30"}),
    "h264.ts": ("libx264", {"g": "30"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:keyint=30"}),
    "vp8.webm": ("libvpx", {"g": "30", **FAST}),
    "vp9.webm": ("libvpx-vp9", {"g": "30", **FAST}),
    "mpeg4.avi": ("mpeg4", {"g": "30"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "15"}),
}


@pytest.mark.parametrize("name", HOLES)
def test_a_hole_is_seen_counted_and_named_and_a_sound_file_has_none(tmp_path, name):
    codec, options = HOLES[name]
    source = write_moving(tmp_path / name, codec, **options)
    assert stored(source)[1].damage.num_damaged == 0
    zero(source, start=0.45, num_bytes=2000)
    with pytest.raises(ValueError, match=rf"{name} is (damaged: \d+ of \d+ frames|cut short)"):
        stored(source)
    assert stored(source, max_damaged=1)[1].damage.share > 0.02


def test_a_part_that_is_gone_leaves_a_gap_in_time_that_counts(tmp_path):
    source = write_moving(tmp_path / "v.mkv", "libx264", num_frames=90, g="10")
    with av.open(str(source)) as container, av.open(str(tmp_path / "gap.mkv"), "w") as target:
        stream = container.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.dts is not None and not 1.0 <= packet.pts * packet.time_base < 1.5:
                packet.stream = copy
                target.mux(packet)
    with pytest.raises(ValueError, match=r"cut short or has holes: its times are of \d+ frames, 7\d are there"):
        stored(tmp_path / "gap.mkv")
    probe = probe_video(tmp_path / "gap.mkv", max_missing=1)
    assert probe.num_frames + probe.num_missing == pytest.approx(90, abs=3)


def copied(source: Path, target: Path, *, without: range) -> Path:
    """The same packets but some, with their times."""
    with av.open(str(source)) as container, av.open(str(target), "w") as written:
        stream = container.streams.video[0]
        copy = written.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
            if number not in without:
                packet.stream = copy
                written.mux(packet)
    return target


def rewritten(source: Path, target: Path, change: Callable[[int, bytes], bytes]) -> Path:
    """The same packets and times, with the bytes that `change` makes of a number and a packet."""
    with av.open(str(source)) as container, av.open(str(target), "w") as written:
        stream = container.streams.video[0]
        copy = written.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
            other = av.Packet(change(number, bytes(packet)))
            other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
            other.is_keyframe, other.stream = packet.is_keyframe, copy
            written.mux(other)
    return target


LOST = {
    "baseline.mp4": ("libx264", {"g": "30", "profile": "baseline"}),
    "pyramid.mkv": ("libx264", {"g": "30", "bf": "3"}),
    "vp8.webm": ("libvpx", {"g": "30", **FAST}),
    "vp9.mkv": ("libvpx-vp9", {"g": "30", **FAST}),
    "mpeg4.mkv": ("mpeg4", {"g": "30"}),
    "mpeg4.mp4": ("mpeg4", {"g": "30"}),
    "mpeg4.mov": ("mpeg4", {"g": "30", "bf": "2"}),
}


@pytest.mark.parametrize("name", LOST)
def test_packets_that_are_missing_are_told_though_the_decoder_is_silent(tmp_path, name):
    codec, options = LOST[name]
    source = write_moving(tmp_path / f"whole-{name}", codec, **options)
    same = copied(source, tmp_path / f"same-{name}", without=range(0))
    for sound in (source, same):
        assert stored(sound)[1].damage.num_damaged == 0
    with pytest.raises(ValueError, match=rf"{name} is (damaged: \d+ of \d+ frames|cut short or has holes)"):
        stored(copied(source, tmp_path / name, without=range(40, 44)))


def damage_of(source: Path) -> Damage:
    """What is found by decoding alone."""
    damage = Damage()
    with open_video(source) as (container, stream):
        for _ in shown_frames(container, stream, damage):
            pass
    return damage


X265 = {"x265-params": "log-level=none:keyint=30:open-gop=0:bframes=0"}


@pytest.mark.parametrize(
    ("name", "codec", "options", "number"),
    [
        ("key.mp4", "libx265", X265, 30),
        ("between.ts", "libx265", X265, 36),
        ("last.mkv", "libx265", X265, 70),
        ("vp8.webm", "libvpx", {"g": "30", "b:v": "600k", **FAST}, 30),
        ("one-group.mp4", "libx264", {"g": "75", "bf": "0"}, 58),
        ("two-groups.ts", "libx264", {"g": "30", "bf": "0"}, 41),
    ],
)
def test_a_picture_made_of_other_bytes_is_told_though_the_decoder_is_silent(tmp_path, name, codec, options, number):
    source = write_moving(tmp_path / f"whole-{name}", codec, num_frames=75, **options)

    def change(place: int, content: bytes) -> bytes:
        if place != number:
            return content
        other = np.random.default_rng(1).integers(1, 256, 24).astype(np.uint8).tobytes()
        half = len(content) // 2
        return content[:half] + other + content[half + 24 :]

    changed = rewritten(source, tmp_path / name, change)
    assert damage_of(source).num_damaged == 0
    step = int(options.get("g", 30))
    assert damage_of(changed).corrupt == pytest.approx(min(75, number - number % step + step) - number, abs=1)


def test_a_page_of_ogg_that_contradicts_its_checksum_is_damage(tmp_path):
    source = write_moving(tmp_path / "v.ogv", "libvpx", g="30", **FAST)
    assert damage_of(source).num_damaged == 0
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    source.write_bytes(content)
    assert damage_of(source).num_damaged > 1


def test_a_picture_that_an_avi_lost_is_told_by_the_times_of_the_others(tmp_path):
    source = write_moving(tmp_path / "whole.avi", "mpeg4", g="30", bf="0")
    assert damage_of(source).num_damaged == 0
    assert damage_of(copied(source, tmp_path / "v.avi", without=range(40, 44))).corrupt == 16


def test_pictures_that_a_broadcast_lost_damage_those_up_to_the_next_key_frame(tmp_path):
    source = write_moving(tmp_path / "whole.ts", "mpeg2video", g="15", bf="0")
    assert damage_of(source).num_damaged == 0
    assert damage_of(copied(source, tmp_path / "v.ts", without=range(35, 38))).corrupt == 7


def test_a_lost_picture_of_a_broadcast_damages_others_only_where_they_are_made_of_it(tmp_path):
    source = write_moving(tmp_path / "whole.ts", "mpeg2video", g="15", bf="2")
    assert damage_of(source).num_damaged == 0
    # Packet 43 is a key frame, and the two behind it are shown before it.
    assert damage_of(copied(source, tmp_path / "p.ts", without=[34])).corrupt == 8
    assert damage_of(copied(source, tmp_path / "b.ts", without=[35])).corrupt == 0


def test_an_avi_that_begins_without_its_key_frame_is_damaged_up_to_the_next(tmp_path):
    source = write_moving(tmp_path / "whole.avi", "mpeg4", g="30", bf="0")
    assert damage_of(copied(source, tmp_path / "v.avi", without=range(1))).num_damaged == 29


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("v.webm", "libvpx", {"g": "30", "deadline": "realtime"}), ("v.mkv", "libx264", {"g": "30", "bf": "0"})],
)
def test_a_recording_that_paused_stands_still_and_one_that_lost_a_part_is_damaged(tmp_path, name, codec, options):
    paused = stored(write_moving(tmp_path / name, codec, num_frames=75, pause=90, **options))[1]
    assert paused.damage.num_damaged == 0
    assert str(paused.damage) == "its picture stands still for 3.0 s, in which it has no frames"
    assert paused.num_frames == pytest.approx(165, abs=1)
    whole = write_moving(tmp_path / f"whole-{name}", codec, num_frames=195, **options)
    lost = tmp_path / f"lost-{name}"
    with pytest.raises(ValueError, match=r"is damaged: \d+ of \d+ frames .*; its picture stands still for [23]\.\d s"):
        stored(copied(whole, lost, without=range(40, 130)))


@pytest.mark.parametrize(
    "milliseconds",
    [
        np.cumsum(np.random.default_rng(0).choice([33, 66, 100, 400, 3000], 60)).tolist(),
        [3000 * number for number in range(30)],
    ],
    ids=["screen", "slides"],
)
def test_frames_that_come_when_something_changes_lack_none(tmp_path, milliseconds):
    source = write_video(tmp_path / "v.mkv", num_frames=len(milliseconds), milliseconds=milliseconds)
    assert damage_of(source).num_damaged == 0


def test_a_picture_with_transparency_is_sound(tmp_path):
    options = {"g": "30", "auto-alt-ref": "0", **FAST}
    source = write_moving(tmp_path / "v.webm", "libvpx", num_frames=40, pix_fmt="yuva420p", **options)
    assert damage_of(source).num_damaged == 0


def test_a_second_view_behind_a_picture_is_no_part_of_it(tmp_path):
    def with_second_view(number: int, packet: bytes) -> bytes:
        views, place = [], 0
        while place < len(packet):
            end = place + 4 + int.from_bytes(packet[place : place + 4], "big")
            if not packet[place + 4] >> 6:  # a slice, again as of layer 1
                views.append(packet[place : place + 5] + bytes([8 | packet[place + 5] & 7]) + packet[place + 6 : end])
            place = end
        return packet + b"".join(views)

    source = write_moving(tmp_path / "one.mp4", "libx265", num_frames=60, **X265)
    assert damage_of(rewritten(source, tmp_path / "two.mp4", with_second_view)).num_damaged == 0


def test_a_film_of_many_cuts_is_not_decoded_over_and_over(tmp_path, monkeypatch):
    calls = []
    decoded = consumption._decoded
    monkeypatch.setattr(consumption, "_MAX_AGAIN", 60)
    monkeypatch.setattr(consumption, "_decoded", lambda *given: calls.append(given[1]) or decoded(*given))
    options = {"x265-params": "log-level=none:keyint=10:min-keyint=10:bframes=0"}
    source = write_moving(tmp_path / "v.mp4", "libx265", num_frames=150, scene=10, **options)
    assert damage_of(source).num_damaged == 0
    assert 150 < sum(map(bool, calls)) < 5 * 150 + 60


def test_a_short_gap_in_a_stream_that_is_numbered_is_a_camera_that_dropped_a_frame(tmp_path):
    source = write_video(tmp_path / "v.mkv", milliseconds=[33 * n + (66 if n > 30 else 0) for n in range(60)])
    assert stored(source)[1].damage.num_damaged == 0


def test_a_picture_that_contradicts_its_own_checksum_is_damaged(tmp_path):
    options = {"x265-params": "log-level=none:keyint=20:hash=1"}
    source = write_moving(tmp_path / "v.mp4", "libx265", num_frames=60, **options)
    assert stored(source)[1].damage.num_damaged == 0
    with av.open(str(source)) as container:
        place, size = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][25]
    content = bytearray(source.read_bytes())
    content[place + size - 60] ^= 0x10
    source.write_bytes(content)
    with pytest.raises(ValueError, match=r"v.mp4 is damaged: \d+ of 60 frames .* corrupt"):
        stored(source)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_zeros_that_fill_up_a_picture_before_the_next_start_code_are_no_damage(tmp_path, codec):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    source = write_video(tmp_path / "whole.ts", codec=codec, options=options)
    rewritten(source, tmp_path / "a.ts", lambda number, content: content + bytes(40))
    assert stored(tmp_path / "a.ts")[1].damage.num_damaged == 0


def test_zeros_that_fill_up_a_constant_bit_rate_are_passed_over_quickly(tmp_path):
    options = dict.fromkeys(("b", "minrate", "maxrate"), "8000k") | {"bufsize": "800k"}
    source = write_video(tmp_path / "v.mpg", num_frames=10, codec="mpeg2video", options=options)
    assert source.stat().st_size > 200_000
    started = process_time()
    assert damage_of(source).num_damaged == 0
    assert process_time() - started < 2


def test_a_recording_that_begins_between_key_frames_is_not_damaged(tmp_path):
    source = write_video(tmp_path / "whole.ts", num_frames=90, options={"g": "30", "bf": "0"})
    with av.open(str(source)) as container, av.open(str(tmp_path / "v.ts"), "w") as target:
        stream = container.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in list(container.demux(stream))[12:]:
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    frames, result = stored(tmp_path / "v.ts")
    assert result.damage.num_damaged == 0
    assert read_numbers(frames) == [*[30] * 18, *range(30, 90)], "the first picture is held before its time"


def test_a_wrong_time_stamp_does_not_make_a_video_of_days(tmp_path):
    source = write_video(tmp_path / "v.mp4", milliseconds=[*(33 * i for i in range(59)), 86_400_000])
    with pytest.raises(ValueError, match=r"one frame would be shown for 8639\d s .* a time stamp is wrong"):
        probe_video(source)


def test_the_check_finds_a_file_that_shows_something_else(tmp_path):
    _, result = stored(write_video(tmp_path / "v.mp4"))
    moved = replace(result, samples={number: picture[::-1] for number, picture in result.samples.items()})
    with pytest.raises(ValueError, match=r"frame \d+ is another one than the source shows"):
        check_normalised(tmp_path / "out.mp4", moved)
    brighter = replace(result, samples={number: picture + 10 for number, picture in result.samples.items()})
    with pytest.raises(ValueError, match=r"looks different \(mean difference 10\.\d levels\)"):
        check_normalised(tmp_path / "out.mp4", brighter)
