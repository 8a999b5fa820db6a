"""TemporalMaxer's pools and masks, any length, its norms and dropout, and configurations that cannot work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from re2tal.localizers import ActionFormerConfig, TemporalMaxerConfig, build_localizer
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.localizers.pyramid.temporalmaxer import MaxPool
from re2tal.structures import Action, Features, Timeline

TINY = TemporalMaxerConfig(channels=16, regression_ranges=((0, 4), (4, 8), (8, 10_000)), input_dropout=0.0)
CLASSES = ("dive", "jump", "run")
SECONDS = Timeline(start_seconds=10.0, seconds_per_step=0.5, duration_seconds=60.0)
CONFIGS = {
    "opentad on thumos": TINY,
    "layer norm": replace(TINY, level_norm="layer", match_keep_share=0.65, match_confused_weight=0.1),
    "affine, wide heads": replace(TINY, level_norm_affine=True, head_channels=24, num_head_convs=1),
    "no norm, kernel 5": replace(TINY, level_norm="none", kernel_size=5, num_embedding_convs=3, label_smoothing=0.1),
    "one level": replace(TINY, regression_ranges=((0, 10_000),), step_supervision=0.5),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config: TemporalMaxerConfig = TINY) -> PyramidLocalizer:
    torch.manual_seed(0)
    localizer = build_localizer(config, in_channels=6, classes=CLASSES)
    assert isinstance(localizer, PyramidLocalizer)
    return localizer


def features(*lengths: int, num_steps: int | None = None) -> Features:
    num_steps = num_steps or max(lengths)
    values = torch.randn(len(lengths), 6, num_steps, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(num_steps) < torch.tensor(lengths)[:, None]
    return Features(values * mask[:, None], mask)


def test_a_pooled_step_is_real_where_any_of_its_three_is_and_the_largest_of_them() -> None:
    # Steps 0, 2, 4 pool (0, 1), (1, 2, 3), (3, 4, 5): with 4 real ones, step 4 pools step 3, so it is real.
    x = torch.tensor([[[1.0, 5.0, 2.0, 4.0, 0.0, 0.0, 0.0]]])
    mask = torch.tensor([[True] * 4 + [False] * 3])
    pooled, pooled_mask = MaxPool()(x, mask)
    assert pooled.tolist() == [[[5.0, 5.0, 4.0, 0.0]]]
    assert pooled_mask.tolist() == [[True, True, True, False]]


@every_config
@pytest.mark.parametrize("num_steps", [1, 2, 7, 32, 45])
def test_any_length_has_points_on_every_level_without_padding(config: TemporalMaxerConfig, num_steps: int) -> None:
    outputs = build(config)(features(num_steps))
    sizes = [-(-num_steps // 2**level) for level in range(config.num_levels)]
    assert outputs.logits.shape == (1, sum(sizes), 3)
    assert len(outputs.points) == sum(sizes)
    assert outputs.mask.all()
    assert outputs.logits.isfinite().all()


@every_config
def test_clips_of_every_kind_have_finite_losses_and_gradients(config: TemporalMaxerConfig) -> None:
    localizer = build(config).train()
    actions = [[Action(12.0, 16.0, "jump"), Action(11.0, 25.0, "run")], [], [], [Action(50.0, 55.0, "dive")]]
    outputs = localizer(features(32, 21, 0, 32))
    losses = localizer.loss(outputs, actions, [SECONDS] * 4)
    losses["total"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in localizer.parameters())
    assert len(localizer.detect(outputs, [SECONDS] * 4)[2]) == 0


def test_dropout_zeroes_whole_channels_of_the_features_in_training_only() -> None:
    localizer = build(replace(TINY, input_dropout=0.5))
    seen = []
    localizer.encoder.embedding[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    clip = features(32)
    localizer.train()(clip)
    localizer.eval()(clip)
    dropped = seen[0] == 0
    assert torch.equal(dropped.any(dim=2), dropped.all(dim=2))
    assert 0 < dropped.all(dim=2).sum() < 6
    assert torch.equal(seen[1], clip.values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level_norm": "batch"}, r"unknown level_norm 'batch'; known: \['layer', 'group', 'none'\]"),
        ({"channels": 18}, "channels=18 must be a multiple of level_norm_groups=4"),
        ({"input_dropout": 1.0}, r"localizer\.input_dropout is 1\.0; give a number from 0 to below 1"),
        ({"match_keep_share": 1.5}, r"localizer\.match_keep_share is 1\.5; give a number from 0 to 1"),
        ({"num_head_convs": 0, "head_channels": 8}, "head_channels=8 needs num_head_convs of 1 or more"),
        ({"kernel_size": 2}, "kernel_size=2 must be odd"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_the_reason(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_encoder_and_assigner_are_parts_that_can_be_exchanged() -> None:
    """An ActionFormer's encoder under TemporalMaxer's heads and assigner, and the other way round."""
    maxer = build(replace(TINY, level_norm="layer"))
    former = build_localizer(
        ActionFormerConfig(channels=16, num_heads=2, max_num_steps=32, regression_ranges=TINY.regression_ranges),
        in_channels=6,
        classes=CLASSES,
    )
    assert isinstance(former, PyramidLocalizer)
    maxer.encoder, former.encoder = former.encoder, maxer.encoder
    maxer.assign, former.assign = former.assign, maxer.assign
    for localizer in (maxer, former):
        outputs = localizer(features(32))
        assert localizer.loss(outputs, [[Action(12.0, 16.0, "jump")]], [SECONDS])["total"].isfinite()
        assert len(localizer.detect(outputs, [SECONDS])[0]) > 0
