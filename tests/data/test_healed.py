"""What a key frame tells of the frames before it: damage that is drawn into a video which decodes without a word."""

from __future__ import annotations

import av
import numpy as np
import pytest

from re2tal.data.building.healed import Healed

RNG = np.random.default_rng(0)
SCENES = [np.kron(RNG.integers(40, 216, (12, 16, 3)), np.ones((10, 10, 1))).astype(np.uint8) for _ in range(3)]


def told(tmp_path, pictures, *, codec="mpeg4", pix_fmt="yuv420p", **options) -> list[int]:
    """What is told at each frame of a video with a key frame every 30."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"g": "30", **options})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pix_fmt
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    healed = Healed()
    with av.open(str(tmp_path / "a.mkv")) as container:
        return [healed.add(frame) for frame in container.decode(video=0)]


def scene(number: int, *, which: int = 0) -> np.ndarray:
    """A room in which a person walks."""
    picture = SCENES[which].copy()
    picture[40:100, number % 130 : number % 130 + 25] = 250
    return picture


@pytest.mark.parametrize(
    ("codec", "pix_fmt"), [("mpeg4", "yuv420p"), ("libx264", "yuv420p10le"), ("libx264", "yuv444p"), ("ffv1", "bgr0")]
)
def test_pictures_that_a_key_frame_puts_right_are_counted(tmp_path, codec, pix_fmt):
    pictures = [scene(number) for number in range(120)]
    for number in range(41, 60):
        pictures[number][60:] = 255 - pictures[number][60:]
    options = {"sc_threshold": "0" if codec == "libx264" else "1000000000"}
    found = told(tmp_path, pictures, codec=codec, pix_fmt=pix_fmt, **options)
    assert {number: count for number, count in enumerate(found) if count} == {60: 19}


@pytest.mark.parametrize("speed", [1, 7, 31])
def test_what_moves_is_not_damaged(tmp_path, speed):
    assert not any(told(tmp_path, [scene(speed * number) for number in range(120)], sc_threshold="1000000000"))


def test_a_cut_is_not_damage(tmp_path):
    pictures = [scene(n, which=(0, 1, 1, 2)[n // 30]) if n < 100 else scene(n, which=0) for n in range(150)]
    assert not any(told(tmp_path, pictures, sc_threshold="1000000000"))


def test_light_that_changes_is_not_damage(tmp_path):
    pictures = [np.clip(scene(n) * (1 - 0.6 * abs(np.sin(n / 17))), 0, 255).astype(np.uint8) for n in range(150)]
    assert not any(told(tmp_path, pictures, sc_threshold="1000000000"))
