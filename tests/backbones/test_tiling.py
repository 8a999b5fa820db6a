"""Long video through clip-wise encoders: order, padding, masks, position tables, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.hub.tiling import ClipEncoder, ClipwiseBackbone, cut, resize_positions


class Averages(ClipEncoder):
    """Mean brightness of every tubelet of 2 frames, and of its whole clip: a step knows which clip it was in."""

    out_channels = 2
    clip_frames = 4
    size = (2, 2)
    patch = (2, 2, 2)

    def forward(self, clips: Tensor) -> Tensor:
        steps = clips.unflatten(1, (2, 2)).mean(dim=(2, 3, 4, 5))
        return torch.stack([steps, clips.mean(dim=(1, 2, 3, 4))[:, None].expand_as(steps)], dim=-1)


def brightness(*values: float) -> Tensor:
    """(1, 3, T, 2, 2): frame t has the brightness values[t]."""
    return torch.tensor(values, dtype=torch.float32)[None, None, :, None, None].expand(1, 3, -1, 2, 2)


def valid(*counts: int, total: int) -> Tensor:
    return torch.arange(total) < torch.tensor(counts)[:, None]


def test_clips_are_encoded_apart_and_their_steps_come_back_in_order() -> None:
    features = ClipwiseBackbone(Averages())(brightness(0, 2, 4, 6, 8, 10, 12, 14), valid(8, total=8))
    assert features.values.tolist() == [[[1, 5, 9, 13], [3, 3, 11, 11]]]
    assert features.mask.all()


def test_the_last_clip_is_filled_up_with_the_last_frame() -> None:
    features = ClipwiseBackbone(Averages())(brightness(0, 2, 4, 6, 8), valid(5, total=5))
    assert features.values.tolist() == [[[1, 5, 8], [3, 3, 8]]]
    assert features.mask.tolist() == [[True, True, True]]


def test_features_of_a_video_do_not_depend_on_its_padding() -> None:
    backbone = ClipwiseBackbone(Averages())
    alone = backbone(brightness(0, 2, 4, 6, 8), valid(5, total=5))
    both = torch.cat([brightness(*range(9)), brightness(0, 2, 4, 6, 8, -1e9, 1e9, float("nan"), 7)])
    padded = backbone(both, valid(9, 5, total=9))
    assert torch.equal(padded.values[1:, :, :3], alone.values)
    assert padded.mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_a_clip_without_any_valid_frame_gives_finite_features() -> None:
    features = ClipwiseBackbone(Averages())(brightness(1, 2, 3), valid(0, total=3))
    assert torch.isfinite(features.values).all()
    assert not features.mask.any()


def test_cutting_keeps_every_frame_in_place() -> None:
    frames = torch.randn(2, 3, 7, 4, 4)
    clips = cut(frames, valid(7, 3, total=7), clip_frames=4, clips=range(2))
    assert clips.shape == (2, 2, 4, 3, 4, 4)
    sources = [[0, 1, 2, 3, 4, 5, 6, 6], [0, 1, 2, 2, 2, 2, 2, 2]]
    for index, frame in enumerate(sources):
        assert torch.equal(clips[index].flatten(0, 1), frames[index].transpose(0, 1)[frame])


def test_a_clip_shorter_than_a_tubelet_is_refused() -> None:
    with pytest.raises(ValueError, match="Averages makes one step of 2 frames; a clip of 1 is too short"):
        ClipwiseBackbone(Averages())(brightness(1), valid(1, total=1))


@pytest.mark.parametrize(("height", "width", "remedy"), [(5, 4, "4 x 4"), (4, 7, "4 x 8"), (1, 1, "2 x 2")])
def test_sizes_that_are_no_multiple_of_the_patch_are_refused(height: int, width: int, remedy: str) -> None:
    message = f"patches of 2 x 2 pixels, which {height} x {width} is no multiple of; crop or resize to {remedy}"
    with pytest.raises(ValueError, match=message):
        ClipwiseBackbone(Averages())(torch.zeros(1, 3, 4, height, width), valid(4, total=4))


def test_clips_that_tubelets_do_not_fill_are_refused() -> None:
    encoder = Averages()
    encoder.clip_frames = 5
    with pytest.raises(ValueError, match="takes clips of 5 frames, which tubelets of 2 frames do not fill"):
        ClipwiseBackbone(encoder)


def test_positions_are_resampled_slice_by_slice() -> None:
    table = nn.Parameter(torch.randn(1, 3 * 4 * 5, 6))
    resized = resize_positions(table, grid=(3, 4, 5), new_grid=(3, 7, 2))
    assert resized.shape == (1, 3 * 7 * 2, 6)
    for time in range(3):
        picture = table[0, time * 20 : (time + 1) * 20].T.reshape(1, 6, 4, 5)
        wanted = F.interpolate(picture, size=(7, 2), mode="bicubic", align_corners=False)[0].flatten(1).T
        torch.testing.assert_close(resized[0, time * 14 : (time + 1) * 14], wanted)
    resized.sum().backward()
    assert table.grad is not None


def test_positions_on_their_own_grid_are_the_table_itself() -> None:
    table = torch.randn(1, 24, 6)
    assert resize_positions(table, grid=(2, 3, 4), new_grid=(2, 3, 4)) is table


def test_half_precision_positions_are_resampled_in_float32() -> None:
    table = torch.randn(1, 16, 6, dtype=torch.bfloat16)
    resized = resize_positions(table, grid=(1, 4, 4), new_grid=(1, 6, 6))
    wanted = resize_positions(table.float(), grid=(1, 4, 4), new_grid=(1, 6, 6)).bfloat16()
    assert torch.equal(resized, wanted)


def test_positions_are_not_stretched_in_time() -> None:
    with pytest.raises(ValueError, match="covers 2 time steps, the clip has 3"):
        resize_positions(torch.zeros(1, 8, 4), grid=(2, 2, 2), new_grid=(3, 2, 2))
