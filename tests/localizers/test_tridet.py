"""TriDet's boundaries from histograms, its block against the definition, its loss, and many configurations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from re2tal.localizers import TriDetConfig, build_localizer
from re2tal.localizers.losses import RunningCount, diou_loss, iou_of_offsets, sigmoid_focal_loss
from re2tal.localizers.pyramid.assignment import Targets
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.localizers.pyramid.loss import PointLoss
from re2tal.localizers.pyramid.points import PyramidOutputs, pyramid_points
from re2tal.localizers.pyramid.tridet import SGPBlock, expected_distances
from re2tal.structures import Action, Features, Timeline

TINY = TriDetConfig(
    channels=16,
    mlp_channels=24,
    max_num_steps=32,
    regression_ranges=((0, 4), (4, 8), (8, 10_000)),
    initial_std=0.3,
    path_drop=0.0,
    num_bins=4,
)
CLASSES = ("dive", "jump", "run")
SECONDS = Timeline(start_seconds=10.0, seconds_per_step=0.5, duration_seconds=60.0)
CONFIGS = {
    "narrow": TINY,
    "windows and kernels": replace(TINY, window=(1, 3, 5), wide_ratio=1.3, head_kernel_size=5, boundary_kernel_size=1),
    "average, wide heads": replace(TINY, downsampling="average", head_channels=24, num_bins=1, iou_power=1.0),
    "positions and smoothing": replace(TINY, position_encoding=True, label_smoothing=0.1, iou_power=0.0),
    "as opentad starts": replace(TINY, initial_std=0.0, num_stem_blocks=0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config: TriDetConfig = TINY) -> PyramidLocalizer:
    torch.manual_seed(0)
    localizer = build_localizer(config, in_channels=6, classes=CLASSES)
    assert isinstance(localizer, PyramidLocalizer)
    return localizer


def features(*lengths: int) -> Features:
    values = torch.randn(len(lengths), 6, max(lengths), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Features(values * mask[:, None], mask)


def test_a_distance_is_the_expectation_over_the_steps_before_and_behind_the_point() -> None:
    generator = torch.Generator().manual_seed(0)
    bins, starts, ends = (torch.randn(1, size, 5, generator=generator, dtype=torch.float64) for size in (6, 2, 2))
    ours = expected_distances(bins, starts, ends)
    assert ours.shape == (1, 5, 2, 2)
    for point in range(5):
        for label in range(2):
            # Two bins of whole strides and one of none; a step outside has a logit of 0.
            before = [starts[0, label, point - d].item() if point >= d else 0.0 for d in range(3)]
            behind = [ends[0, label, point + d].item() if point + d < 5 else 0.0 for d in range(3)]
            # The bins to the start are stored farthest first.
            left = [math.exp(before[d] + bins[0, 2 - d, point].item()) for d in range(3)]
            right = [math.exp(behind[d] + bins[0, 3 + d, point].item()) for d in range(3)]
            expected = [sum(d * weight for d, weight in enumerate(side)) / sum(side) for side in (left, right)]
            assert ours[0, point, label].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("window", "ratio", "wide"), [(1, 5.0, 11), (5, 1.3, 9), (3, 1.2, 5), (15, 1.3, 21)])
def test_the_wide_convolution_covers_an_odd_multiple_of_the_window(window: int, ratio: float, wide: int) -> None:
    block = SGPBlock(
        16,
        stride=1,
        window=window,
        wide_ratio=ratio,
        mlp_channels=16,
        downsampling="max",
        initial_std=1.0,
        path_drop=None,
    )
    assert block.wide.kernel_size == (wide,)
    assert block.near.kernel_size == block.gate.kernel_size == (window,)
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 8, dtype=torch.bool)
    y = torch.nn.functional.layer_norm(x.transpose(1, 2), (16,)).transpose(1, 2)
    for conv in (block.near, block.wide, block.gate, block.instant, block.overall):
        assert conv.groups == 16
    mixed = block.instant(y) * block.overall(y.mean(dim=2, keepdim=True)).clamp(min=0)
    mixed = x + mixed + (block.near(y) + block.wide(y)) * block.gate(y) + y
    inner = block.mlp[0](torch.nn.functional.group_norm(mixed, 16))
    expected = mixed + block.mlp[2](0.5 * inner * (1 + torch.erf(inner / 2**0.5)))
    torch.testing.assert_close(block(x, mask)[0], expected, rtol=1e-4, atol=1e-5)


@every_config
@pytest.mark.parametrize("num_steps", [1, 13, 32, 45])
def test_any_length_has_points_on_every_level_of_the_padded_clip(config: TriDetConfig, num_steps: int) -> None:
    outputs = build(config).eval()(features(num_steps))
    padded = config.padded_steps(num_steps)
    assert padded % 4 == 0
    assert outputs.logits.shape == (1, padded + padded // 2 + padded // 4, 3)
    assert outputs.offsets.shape == (*outputs.logits.shape, 2)
    assert outputs.mask.sum() == sum(-(-num_steps // 2**level) for level in range(3))
    assert (outputs.offsets >= 0).all()
    assert (outputs.offsets <= config.num_bins).all()


@every_config
def test_clips_of_every_kind_have_finite_losses_and_gradients(config: TriDetConfig) -> None:
    localizer = build(config).train()
    actions = [[Action(12.0, 16.0, "jump"), Action(11.0, 25.0, "run"), Action(12.0, 16.0, "dive")], [], []]
    outputs = localizer(features(32, 21, 0))
    losses = localizer.loss(outputs, actions, [SECONDS] * 3)
    losses["total"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in localizer.parameters())
    assert len(localizer.detect(outputs, [SECONDS] * 3)[2]) == 0


def test_start_and_end_heads_teach_the_pyramid_nothing() -> None:
    localizer = build().train()
    clip = features(32)
    pyramid = localizer.encoder(*clip)
    head = localizer.regressor
    apart = pyramid._replace(levels=tuple(level.detach().requires_grad_() for level in pyramid.levels))
    with torch.no_grad():
        head.output.weight.zero_()  # what is left comes from starts and ends alone
    head(apart).sum().backward()
    assert all(level.grad is None or torch.count_nonzero(level.grad) == 0 for level in apart.levels)
    assert torch.count_nonzero(head.starts.output.weight.grad) > 0


def test_noise_is_added_in_training_only() -> None:
    localizer = build(replace(TINY, input_noise=0.5))
    seen = []
    localizer.encoder.embedding[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    clip = features(32)
    localizer.train()(clip)
    localizer.eval()(clip)
    assert 0.3 < (seen[0] - clip.values).std() < 0.7
    assert torch.equal(seen[1], clip.values)


def test_a_class_that_is_right_weighs_its_iou_and_each_class_regresses_its_own_segment() -> None:
    points = pyramid_points(2, ((0, 10_000),))
    logits = torch.tensor([[[0.5, -1.0], [0.2, 0.3]]])
    offsets = torch.tensor([[[[1.0, 1.0], [2.0, 1.0]], [[1.0, 3.0], [1.0, 1.0]]]], requires_grad=True)
    targets = Targets(
        torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[2.0, 2.0], [9.0, 9.0]]]), torch.ones(1, 2)
    )
    outputs = PyramidOutputs(logits, offsets, points, torch.ones(1, 2, dtype=torch.bool), torch.empty(0))
    count = RunningCount(8, momentum=0.9)
    losses = PointLoss(0.0, 1.5, stored_count=True, iou_power=0.5)(outputs, targets, positives=count, training=False)
    focal = sigmoid_focal_loss(logits, targets.classes)[0]
    # IoU of [-1, 1] and [-2, 2] is 2/4, of [-2, 1] and [-2, 2] 3/4. One point is positive; the stored count is 8.
    expected = focal[0, 0] * 0.5**0.5 + focal[0, 1] * 0.75**0.5 + focal[1].sum()
    torch.testing.assert_close(losses["classification"], expected / 8)
    pairs = diou_loss(offsets[0, 0], torch.tensor([[2.0, 2.0], [2.0, 2.0]])).sum()
    torch.testing.assert_close(losses["regression"], 1.5 * pairs)


def test_classes_that_share_a_segment_share_its_iou() -> None:
    points, mask = pyramid_points(2, ((0, 10_000),)), torch.ones(1, 2, dtype=torch.bool)
    outputs = PyramidOutputs(torch.zeros(1, 2, 3), torch.ones(1, 2, 2), points, mask, torch.empty(0))
    targets = Targets(torch.tensor([[[1.0, 0, 1], [0, 1, 0]]]), torch.tensor([[[1.0, 3], [4, 4]]]), torch.ones(1, 2))
    losses = PointLoss(0.0, 1.0, iou_power=1.0)(outputs, targets, positives=RunningCount(1, momentum=0), training=False)
    focal = sigmoid_focal_loss(outputs.logits, targets.classes)
    # The IoU of [-1, 1] is 1/2 with [-1, 3] and 1/4 with [-4, 4]; two points are positive.
    expected = (focal * torch.tensor([[[0.5, 1, 0.5], [1, 0.25, 1]]])).sum() / 2
    torch.testing.assert_close(losses["classification"], expected)


def test_the_loss_of_a_segment_without_any_length_has_finite_gradients() -> None:
    offsets = torch.zeros(1, 1, 1, 2, requires_grad=True)
    assert iou_of_offsets(offsets, torch.ones(1, 1, 1, 2)).item() == 0
    points, mask = pyramid_points(1, ((0, 10_000),)), torch.ones(1, 1, dtype=torch.bool)
    outputs = PyramidOutputs(torch.zeros(1, 1, 1), offsets, points, mask, torch.empty(0))
    targets = Targets(torch.ones(1, 1, 1), torch.ones(1, 1, 2), torch.ones(1, 1))
    losses = PointLoss(0.0, 1.0, iou_power=0.2)(
        outputs, targets, positives=RunningCount(1, momentum=0.9), training=False
    )
    losses["classification"].backward()
    assert offsets.grad.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 24}, "channels=24 must be a multiple of 16"),
        ({"downsampling": "avg"}, r"unknown downsampling 'avg'; known: \['max', 'average'\]"),
        ({"window": (1, 3)}, r"window=\(1, 3\) must have one entry per level; there are 3"),
        ({"window": 4}, "window=4 must be odd"),
        ({"head_kernel_size": 2}, "head_kernel_size=2 must be odd"),
        ({"boundary_kernel_size": 2}, "boundary_kernel_size=2 must be odd"),
        ({"num_bins": 0}, "localizer.num_bins is 0; give 1 or more"),
        ({"max_num_steps": 30}, "max_num_steps=30 must be a multiple of 4"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_the_reason(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
