import colorsys

import numpy as np
import pytest
import torch

from re2tal.data.streaming.transforms import (
    MEAN,
    STD,
    Box,
    colour_map,
    crop_and_resize,
    draw_box,
    draw_colours,
    normalise,
    recolour,
    square_box,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def jittered(frames: torch.Tensor, *, strength: float, generator: torch.Generator) -> torch.Tensor:
    return recolour(frames, *draw_colours(frames, strength=strength, generator=generator))


def test_a_box_of_the_final_size_is_cut_out_unchanged():
    frames = noise(4, 20, 30, 3)
    cut = crop_and_resize(frames, Box(2, 5, 16, 16), size=16)
    assert cut.shape == (3, 4, 16, 16)
    assert torch.equal(cut, frames[:, 2:18, 5:21].permute(3, 0, 1, 2))


def test_shrinking_to_a_half_is_close_to_the_antialiasing_triangle():
    # A triangle of radius two pixels around the centre of each output pixel: weights 1, 3, 3, 1 of 8 per axis.
    frames = noise(2, 32, 32, 3)
    small = crop_and_resize(frames, Box(0, 0, 32, 32), size=16).double()
    kernel = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    kernel = torch.outer(kernel, kernel).expand(3, 1, 4, 4)
    wanted = torch.nn.functional.conv2d(frames.permute(0, 3, 1, 2).double(), kernel, stride=2, padding=1, groups=3)
    difference = (small - wanted.transpose(0, 1))[..., 1:-1, 1:-1].abs()
    assert difference.max() <= 1.01


def test_flipping_mirrors_left_and_right():
    frames = noise(2, 8, 8, 3)
    plain, flipped = (crop_and_resize(frames, Box(0, 0, 8, 8), size=8, flip=flip) for flip in (False, True))
    assert torch.equal(flipped, plain.flip(-1))


def test_a_stretched_box_moves_a_point_to_where_it_belongs():
    frames = torch.zeros(1, 40, 80, 3, dtype=torch.uint8)
    frames[:, 30:32, 20:24] = 255  # three quarters down, about a quarter to the right
    picture = crop_and_resize(frames, Box(0, 0, 40, 80), size=20)[0, 0]
    row, column = divmod(int(picture.argmax()), 20)
    assert (row, column) == (15, 5)


@pytest.mark.parametrize(("height", "width", "box"), [(10, 16, (0, 3, 10, 10)), (17, 10, (3, 0, 10, 10))])
def test_the_square_box_is_the_largest_square_in_the_middle(height, width, box):
    assert square_box(height, width) == box


def test_a_square_may_lie_at_either_end_of_the_longer_side():
    assert [square_box(4, 10, place=place) for place in (0.0, 1.0)] == [Box(0, 0, 4, 4), Box(0, 6, 4, 4)]
    assert [square_box(10, 4, place=place) for place in (0.0, 1.0)] == [Box(0, 0, 4, 4), Box(6, 0, 4, 4)]


def test_drawn_boxes_lie_inside_and_have_the_area_and_shape_asked_for():
    generator = np.random.default_rng(0)
    boxes = [draw_box(120, 160, area=(0.2, 0.6), aspect=(0.5, 2.0), generator=generator) for _ in range(500)]
    for top, left, height, width in boxes:
        assert 0 <= top <= 120 - height
        assert 0 <= left <= 160 - width
        assert 0.19 < height * width / (120 * 160) < 0.61
        assert 0.48 < width / height < 2.1
    shares = [box.height * box.width / (120 * 160) for box in boxes]
    assert min(shares) < 0.25
    assert max(shares) > 0.5


def test_a_box_that_cannot_fit_is_the_centre_square():
    assert draw_box(10, 200, area=(1, 1), aspect=(1, 1), generator=np.random.default_rng(0)) == (0, 95, 10, 10)


def test_normalising_subtracts_the_mean_and_divides_by_the_deviation():
    frames = noise(2, 3, 4, 5, 6)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(normalise(frames).double(), (frames.double() - mean) / std, atol=1e-6, rtol=1e-6)
    assert normalise(frames, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_no_jitter_is_normalising():
    frames = noise(2, 3, 4, 5, 6)
    found = jittered(frames, strength=0.0, generator=torch.Generator())
    torch.testing.assert_close(found, normalise(frames), atol=2e-5, rtol=1e-5)


def test_the_colour_map_is_brightness_then_contrast_then_saturation():
    changes = torch.tensor([[0.3, -0.2, 0.5, 0.0]], dtype=torch.float64)
    pixels = noise(100, 3).double()
    mean_grey = torch.tensor([90.0], dtype=torch.float64)
    matrix, bias = colour_map(changes, mean_grey)
    wanted = pixels * 1.3
    wanted = 0.8 * wanted + 0.2 * 90.0 * 1.3
    grey = wanted @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    wanted = grey[:, None] + 1.5 * (wanted - grey[:, None])
    torch.testing.assert_close(pixels @ matrix[0].T + bias[0], wanted, atol=1e-6, rtol=1e-6)


def test_turning_the_hue_keeps_greyness_and_turns_colours():
    matrix, bias = colour_map(torch.tensor([[0, 0, 0, 4 / 3]], dtype=torch.float64), torch.zeros(1).double())
    assert bias.abs().max() == 0
    red = matrix[0] @ torch.tensor([1.0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(matrix[0] @ torch.ones(3).double(), torch.ones(3).double(), atol=1e-6, rtol=0)
    assert red @ torch.tensor([0.299, 0.587, 0.114]).double() == pytest.approx(0.299, abs=1e-6)
    hue = colorsys.rgb_to_hsv(*red.clamp(0, 1).tolist())[0]
    assert min(abs(hue - 1 / 3), abs(hue - 2 / 3)) < 0.12  # a third of a turn away from red, green or blue


def test_all_frames_of_a_clip_change_alike_and_clips_differ():
    frames = noise(1, 3, 1, 8, 8).expand(2, 3, 5, 8, 8).contiguous()
    found = jittered(frames, strength=0.4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found[:, :, 0], found[:, :, 4])
    assert not torch.allclose(found[0], found[1], atol=0.05)


def test_the_generator_decides_the_colours():
    frames = noise(2, 3, 2, 4, 4)
    once, again, other = (
        jittered(frames, strength=0.4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_a_strength_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"colour jitter is 1\.5"):
        jittered(noise(1, 3, 1, 2, 2), strength=1.5, generator=torch.Generator())
