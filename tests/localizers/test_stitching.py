"""Video self-stitching: where the copy lies, what it shows, which edges the graph gets, and that it is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from re2tal.localizers.vsgn.config import VSGNConfig
from re2tal.localizers.vsgn.localizer import VSGN
from re2tal.localizers.vsgn.network import nearest
from re2tal.localizers.vsgn.stitching import Layout, stitch
from re2tal.structures import Action, Features, Timeline

STEPS = Timeline(start_seconds=0.0, seconds_per_step=1.0, duration_seconds=1000.0)
TINY = VSGNConfig(
    channels=16,
    num_groups=4,
    num_levels=3,
    first_stride=2,
    num_neighbours=4,
    num_head_convs=1,
    stitch_below=0.4,
    stitch_gap=4,
)


def clips(*lengths: int, num_steps: int = 40) -> Features:
    values = torch.randn(len(lengths), 6, num_steps, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(num_steps) < torch.tensor(lengths)[:, None]
    return Features(values * mask[:, None], mask)


def test_a_short_clip_is_followed_by_a_gap_and_by_itself_stretched_to_the_end() -> None:
    features = clips(12, 17, 0)
    layout = Layout.of(features.mask, below=0.4, gap=4)
    values, mask = stitch(features, layout)
    # 40 - 12 - 4 = 24 steps are left: twice the clip. The second has more than 16 = 0.4 * 40 steps, the third none.
    assert layout.first.tolist() == [16, 40, 40]
    assert layout.zoom.tolist() == [2.0, 1.0, 1.0]
    own = features.values[:1, :, :12]
    copy = F.interpolate(own, size=24, mode="linear", align_corners=False)
    torch.testing.assert_close(values[:1], torch.cat([own, torch.zeros(1, 6, 4), copy], dim=2))
    assert mask[0].tolist() == [True] * 12 + [False] * 4 + [True] * 24
    assert torch.equal(values[1:], features.values[1:])
    assert torch.equal(mask[1:], features.mask[1:])


def test_segments_go_to_the_copy_and_back() -> None:
    layout = Layout.of(clips(12, 17).mask, below=0.4, gap=4)
    there = layout.to_copy(torch.tensor([[0.0, 12.0], [3.0, 4.5]]), 0)
    assert there.tolist() == [[16.0, 40.0], [22.0, 25.0]]
    assert layout.to_clip(there[None].expand(2, -1, -1))[0].tolist() == [[0.0, 12.0], [3.0, 4.5]]
    assert layout.to_copy(torch.tensor([[3.0, 4.5]]), 1).tolist() == [[3.0, 4.5]]


def test_half_of_the_neighbours_of_a_step_in_the_copy_lie_outside_it() -> None:
    steps = torch.tensor([[[0.0], [10.0], [20.0], [0.1], [0.2], [0.3]]])
    copied = torch.tensor([[False, False, False, True, True, True]])
    found = nearest(steps, 4, copied)[0]
    assert found[4].tolist()[:2] in ([4, 3], [4, 5])
    assert found[4].tolist()[2:] == [0, 1]
    # Outside the copy nothing is ruled out: the same steps as without stitching.
    assert set(found[0].tolist()) == set(nearest(steps, 4)[0, 0].tolist())


def test_without_short_clips_stitching_changes_nothing() -> None:
    features = clips(40, 30)
    stitched, plain = (build(below) for below in (0.4, None))
    truth = [[Action(3.0, 9.0, "dive")], [Action(10.0, 25.0, "jump")]]
    losses = [one.loss(one(features), truth, [STEPS, STEPS]) for one in (stitched, plain)]
    for name, value in losses[1].items():
        torch.testing.assert_close(losses[0][name], value, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        *(one.eval().detect(one(features), [STEPS, STEPS]) for one in (stitched, plain)), strict=True
    ):
        torch.testing.assert_close(ours.segments, theirs.segments)
        torch.testing.assert_close(ours.scores, theirs.scores)


def test_what_is_found_in_the_copy_lies_in_the_clip() -> None:
    localizer, features = build(0.4).eval(), clips(12)
    (candidates,) = localizer.candidates(localizer(features))
    (fewer,) = build(None).eval().candidates(build(None).eval()(features))
    assert len(candidates.scores) > 2 * len(fewer.scores)
    assert candidates.segments.min() >= 0
    # The last step of the grid, 39, shows 11.5 of the clip.
    assert candidates.segments.max() <= 11.5


def test_the_loss_of_a_tiny_vsgn_with_stitched_clips_falls_under_adam() -> None:
    localizer, features = build(0.4).train(), clips(12, 40)
    optimizer = torch.optim.Adam(localizer.parameters(), lr=2e-3, weight_decay=1e-4)
    truth = [[Action(5.0, 7.0, "dive")], [Action(2.0, 6.0, "jump"), Action(20.0, 38.0, "dive")]]
    losses = []
    for _ in range(30):
        loss = localizer.loss(localizer(features), truth, [STEPS, STEPS])["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(parameter).all() for parameter in localizer.parameters())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("length", [0.1, 1.0, 7.0, 31.0])
def test_every_action_of_a_window_trains_an_anchor(length: float) -> None:
    localizer, features = build(0.4).train(), clips(40)
    outputs = localizer(features)
    for start in torch.arange(0, 40 - length, 0.3).tolist():
        truth = localizer._truth(outputs, [[Action(start, start + length, "jump")]], [STEPS])
        matches = localizer._matches(outputs.anchors[None], truth, torch.tensor([True]), 0.5)
        assert (matches.labels == 2).any(), start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stitch_below": 1.0}, r"localizer\.stitch_below is 1\.0; give a number between 0 and 1"),
        ({"stitch_gap": -1}, r"localizer\.stitch_gap is -1; give 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VSGNConfig(**changes)


def build(below: float | None) -> VSGN:
    torch.manual_seed(0)
    return VSGN(replace(TINY, stitch_below=below), in_channels=6, classes=("dive", "jump"))
