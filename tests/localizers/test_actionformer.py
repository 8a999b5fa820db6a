"""ActionFormer as a whole: any length, batches, padding, robustness of the loss, candidates, configuration errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from re2tal.localizers import ActionFormerConfig, build_localizer
from re2tal.localizers.candidates import best_of_clip, best_of_each_level
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.structures import Action, Features, Timeline

TINY = ActionFormerConfig(
    channels=16,
    num_heads=2,
    max_num_steps=32,
    regression_ranges=((0, 4), (4, 8), (8, 10_000)),
    path_drop=0.0,
)
CLASSES = ("dive", "jump", "run")
SECONDS = Timeline(start_seconds=10.0, seconds_per_step=0.5, duration_seconds=60.0)


def build(config: ActionFormerConfig = TINY, *, classes: tuple[str, ...] = CLASSES) -> PyramidLocalizer:
    """A localizer with weights of ordinary size: as built, the residual branches hardly count."""
    torch.manual_seed(0)
    localizer = build_localizer(config, in_channels=6, classes=classes)
    assert isinstance(localizer, PyramidLocalizer)
    for parameter in localizer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return localizer


def features(*lengths: int, num_steps: int | None = None, seed: int = 0) -> Features:
    """Clips of these lengths, zero in the padding."""
    num_steps = num_steps or max(lengths)
    values = torch.randn(len(lengths), 6, num_steps, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(num_steps) < torch.tensor(lengths)[:, None]
    return Features(values * mask[:, None], mask)


VARIANTS = [
    TINY,
    replace(TINY, variant="original"),
    replace(TINY, attention_window=5, position_encoding=True),
    replace(TINY, attention_window=(3, 5, None), head_channels=24),
]
all_variants = pytest.mark.parametrize("config", VARIANTS, ids=["opentad", "original", "local", "per level"])


@all_variants
@pytest.mark.parametrize("num_steps", [1, 7, 32, 33, 71])
def test_any_length_gives_a_prediction_at_every_step_of_every_level(config: ActionFormerConfig, num_steps: int) -> None:
    outputs = build(config)(features(num_steps))
    padded = config.padded_steps(num_steps)
    assert padded >= num_steps
    assert outputs.logits.shape == (1, padded + padded // 2 + padded // 4, 3)
    assert outputs.offsets.shape == (*outputs.logits.shape[:2], 2)
    assert outputs.mask.sum() == num_steps + -(-num_steps // 2) + -(-num_steps // 4)
    assert (outputs.offsets >= 0).all()
    assert outputs.logits.isfinite().all()


@all_variants
def test_a_clip_has_the_same_numbers_alone_as_padded_in_a_batch(config: ActionFormerConfig) -> None:
    localizer = build(config).eval()
    batch = features(32, 19)
    alone = Features(batch.values[1:, :, :19], batch.mask[1:, :19])
    together, single = localizer(batch), localizer(alone)
    assert torch.equal(together.mask[1:], single.mask)
    real = single.mask[0]
    torch.testing.assert_close(together.logits[1, real], single.logits[0, real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.offsets[1, real], single.offsets[0, real], rtol=1e-5, atol=1e-5)


@all_variants
def test_what_lies_in_the_padding_beyond_the_first_convolution_is_never_read(config: ActionFormerConfig) -> None:
    localizer = build(config).eval()
    clean = features(19, num_steps=32)
    dirty = clean.values.clone()
    # The first convolution reads one step past the end; what is stored there is the caller's.
    dirty[:, :, 20:] = 1e6
    expected, ours = localizer(clean), localizer(Features(dirty, clean.mask))
    torch.testing.assert_close(ours.logits[ours.mask], expected.logits[expected.mask])
    torch.testing.assert_close(ours.offsets[ours.mask], expected.offsets[expected.mask])


def test_forward_leaves_the_running_count_alone_and_training_losses_update_it() -> None:
    localizer = build().train()
    before = localizer.positives.value()
    outputs = localizer(features(32))
    actions = [[Action(12.0, 15.0, "jump")]]
    assert torch.equal(localizer.positives.value(), before)
    localizer.eval().loss(outputs, actions, [SECONDS])
    assert torch.equal(localizer.positives.value(), before)
    localizer.train().loss(outputs, actions, [SECONDS])
    assert localizer.positives.value() < before


def test_detections_are_in_seconds_of_the_video_and_inside_it() -> None:
    localizer = build().eval()
    outputs = localizer(features(32))
    steps, seconds = localizer.candidates(outputs)[0], localizer.detect(outputs, [SECONDS])[0]
    torch.testing.assert_close(seconds.segments, (10.0 + 0.5 * steps.segments).clamp(0.0, 60.0))
    assert torch.equal(seconds.scores, steps.scores)


def test_an_untrained_localizer_scores_every_class_with_the_prior() -> None:
    localizer = build_localizer(replace(TINY, prior_probability=0.02), in_channels=6, classes=CLASSES).eval()
    assert isinstance(localizer, PyramidLocalizer)
    localizer.classifier.output.weight.data.zero_()
    scores = localizer(features(32)).logits.sigmoid()
    torch.testing.assert_close(scores, torch.full_like(scores, 0.02))


def test_the_best_of_a_clip_are_chosen_over_all_classes() -> None:
    segments = torch.tensor([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]])
    scores = torch.tensor([[0.9, 0.0005], [0.3, 0.8], [0.2, 0.1]])
    found = best_of_clip(segments, scores, min_score=0.001, top_k=3)
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.3])
    assert found.labels.tolist() == [0, 1, 0]
    assert found.segments.tolist() == [[0, 1], [1, 2], [1, 2]]
    single = best_of_clip(segments, scores[:, 1:], min_score=0.5, top_k=1)
    assert len(single.scores) == 3


def test_the_best_of_each_level_leave_out_what_is_too_short() -> None:
    segments = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 9.0]])
    scores = torch.tensor([[0.9], [0.8], [0.1]])
    levels = torch.tensor([1.0, 1.0, 2.0])
    found = best_of_each_level(segments, scores, levels, min_score=0.05, top_k=2, min_steps=0.05)
    assert found.scores.tolist() == pytest.approx([0.9, 0.1])
    one_each = best_of_each_level(segments, scores, levels, min_score=0.05, top_k=1, min_steps=0.05)
    assert one_each.scores.tolist() == pytest.approx([0.9, 0.1])
    none = best_of_each_level(segments[:0], scores[:0], levels[:0], min_score=0.05, top_k=1, min_steps=0.05)
    assert [tuple(one.shape) for one in none] == [(0, 2), (0,), (0,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "opened"}, r"unknown variant 'opened'; known: \['opentad', 'original'\]"),
        ({"channels": 15}, "channels=15 must be a multiple of num_heads=2"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"max_num_steps": 30}, "max_num_steps=30 must be a multiple of 4"),
        ({"attention_window": (3, 3)}, r"attention_window=\(3, 3\) must have one entry per level; there are 3"),
        ({"attention_window": 1}, "attention_window=1 must be at least 2 steps, or None"),
        ({"regression_ranges": ((4, 4), (4, 8), (8, 9))}, "with low < high"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_the_reason(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_classes_must_be_distinct() -> None:
    with pytest.raises(ValueError, match="classes must be distinct and at least one"):
        build_localizer(TINY, in_channels=6, classes=("run", "run"))


def test_an_unknown_localizer_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown localizer 'actionfromer'; known: \[.*'actionformer'"):
        build_localizer(replace(TINY, name="actionfromer"), in_channels=6, classes=CLASSES)
