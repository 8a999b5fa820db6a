"""What every row of LOCALIZERS promises, whatever is inside."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch

from re2tal.localizers import LOCALIZERS, LocalizerConfig, build_localizer
from re2tal.localizers.base import Localizer
from re2tal.structures import Action, Features, Timeline

CLASSES = ("dive", "jump", "run")
SECONDS = Timeline(start_seconds=10.0, seconds_per_step=0.5, duration_seconds=60.0)
ACTIONS = [Action(12.0, 16.0, "jump"), Action(18.0, 24.0, "run"), Action(11.0, 12.5, "dive")]
SMALL = {
    "channels": 16,
    "num_heads": 2,
    "num_groups": 4,
    "num_levels": 3,
    "first_stride": 2,
    "max_num_steps": 32,
    "num_neighbours": 4,
    "num_head_convs": 1,
    "regression_ranges": ((0, 4), (4, 8), (8, 10_000)),
}
"""Small sizes under the names that localizers give them; what a localizer calls otherwise keeps its default."""
QUIET = ("dropout", "path_drop", "input_dropout", "input_noise")
"""What makes two passes differ."""
KINDS: dict[str, type] = {kind.name: kind for kind in get_args(LocalizerConfig)}
every_localizer = pytest.mark.parametrize("name", sorted(LOCALIZERS))


def build(name: str, **changes: bool) -> Localizer:
    torch.manual_seed(0)
    return build_localizer(tiny(name, **changes), in_channels=6, classes=CLASSES)


def tiny(name: str, **changes: bool) -> LocalizerConfig:
    """The row's own configuration, small and without randomness."""
    values = SMALL | dict.fromkeys(QUIET, 0.0)
    known = {field.name for field in fields(KINDS[name])}
    return KINDS[name](**{key: value for key, value in values.items() if key in known}, **changes)


def features(*lengths: int, dtype: torch.dtype = torch.float32) -> Features:
    values = torch.randn(len(lengths), 6, max(lengths), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Features((values * mask[:, None]).to(dtype), mask)


def test_every_configuration_names_a_builder_and_every_builder_has_a_configuration() -> None:
    assert list(KINDS) == list(LOCALIZERS)


@every_localizer
def test_every_number_has_a_range_and_is_named_with_it(name: str) -> None:
    config = KINDS[name]()
    numbers = [field.name for field in fields(config) if type(getattr(config, field.name)) in (int, float)]
    assert len(numbers) > 10
    for field in numbers:
        for value in (-1, float("nan")):
            with pytest.raises(ValueError, match=rf"^(localizer\.)?{field}( is |=){value}"):
                replace(config, **{field: value})


@every_localizer
@pytest.mark.parametrize("num_steps", [1, 13, 32, 50])
def test_forward_gives_the_same_named_tuple_of_tensors_in_training_and_evaluation(name: str, num_steps: int) -> None:
    localizer = build(name)
    training, evaluation = (localizer.train(mode)(features(num_steps)) for mode in (True, False))
    assert type(training) is type(evaluation)
    assert hasattr(training, "_fields")
    for one, other in zip(training, evaluation, strict=True):
        torch.testing.assert_close(one, other)


@every_localizer
def test_all_parameters_are_used_in_forward_and_none_in_the_loss(name: str) -> None:
    localizer = build(name).train()
    outputs = localizer(features(32, 20))
    leaves = type(outputs)(*(x.detach().requires_grad_(x.is_floating_point()) for x in outputs))
    localizer.loss(leaves, [ACTIONS, ACTIONS[:1]], [SECONDS, SECONDS])["total"].backward()
    assert all(parameter.grad is None for parameter in localizer.parameters())
    localizer.loss(outputs, [ACTIONS, ACTIONS[:1]], [SECONDS, SECONDS])["total"].backward()
    unused = [key for key, parameter in localizer.named_parameters() if parameter.grad is None]
    assert unused == []


@every_localizer
def test_the_total_is_the_sum_of_the_named_losses(name: str) -> None:
    localizer = build(name).eval()
    losses = localizer.loss(localizer(features(32)), [ACTIONS], [SECONDS])
    parts = [value for key, value in losses.items() if key != "total"]
    torch.testing.assert_close(losses["total"], torch.stack(parts).sum())
    assert all(value.ndim == 0 for value in losses.values())


@every_localizer
@pytest.mark.parametrize("actions", [[[], []], [ACTIONS, []]], ids=["nowhere", "in one clip"])
def test_clips_without_actions_have_finite_losses_and_gradients(name: str, actions: list) -> None:
    localizer = build(name).train()
    losses = localizer.loss(localizer(features(32, 20)), actions, [SECONDS, SECONDS])
    assert all(value.isfinite() for value in losses.values())
    losses["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in localizer.parameters())


@pytest.mark.parametrize(
    ("name", "switch"),
    [(name, field.name) for name, kind in KINDS.items() for field in fields(kind) if isinstance(field.default, bool)],
)
def test_it_trains_in_bfloat16_with_buffers_in_float32_as_deepspeed_leaves_them(name: str, switch: str) -> None:
    default = getattr(KINDS[name](), switch)
    localizer = build(name, **{switch: not default}).train()
    for parameter in localizer.parameters():
        parameter.data = parameter.data.bfloat16()
    outputs = localizer(features(32, 20, dtype=torch.bfloat16))
    localizer.loss(outputs, [ACTIONS, ACTIONS[:1]], [SECONDS, SECONDS])["total"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in localizer.parameters())


@every_localizer
def test_a_clip_that_could_not_be_decoded_adds_nothing(name: str) -> None:
    localizer = build(name).eval()
    alone = localizer.loss(localizer(features(32)), [ACTIONS], [SECONDS])
    batch = features(32, 0)
    outputs = localizer(batch)
    together = localizer.loss(outputs, [ACTIONS, []], [SECONDS, SECONDS])
    torch.testing.assert_close(together["total"], alone["total"])
    assert len(localizer.detect(outputs, [SECONDS, SECONDS])[1]) == 0


@every_localizer
def test_a_batch_of_nothing_but_such_clips_has_a_finite_loss_with_zero_gradients(name: str) -> None:
    localizer = build(name).train()
    losses = localizer.loss(localizer(Features(torch.zeros(1, 6, 32), torch.zeros(1, 32) > 0)), [[]], [SECONDS])
    losses["total"].backward()
    assert all(p.grad is not None and torch.count_nonzero(p.grad) == 0 for p in localizer.parameters())


@every_localizer
def test_detections_lie_inside_the_video_and_know_their_class(name: str) -> None:
    localizer = build(name).eval()
    for found in localizer.detect(localizer(features(32, 20)), [SECONDS, SECONDS]):
        assert len(found) > 0
        assert (found.segments[:, 0] <= found.segments[:, 1]).all()
        assert found.segments.min() >= 0.0
        assert found.segments.max() <= 60.0
        assert found.labels.dtype == torch.int64
        assert found.labels.min() >= 0
        assert found.labels.max() < len(CLASSES)
        assert not found.scores.requires_grad


def check_decoding_honours_the_mask(localizer: Localizer) -> None:
    """Of a clip with 20 real steps of 32 no detection may lie in the padding, which begins 20 s into the video and ends
    at 26 s; a step of a coarse level that pools a real one may stand up to 2 s behind it."""
    with torch.no_grad():
        whole, padded = localizer.eval().detect(localizer(features(32, 20)), [SECONDS, SECONDS])
    assert len(padded) > 0
    assert whole.segments[:, 0].max() >= 22.0, "no detection of the whole clip lies there either"
    beyond = padded.segments[:, 0] >= 22.0
    assert not beyond.any(), f"{int(beyond.sum())} of {len(padded)} detections lie in the padding"


@every_localizer
def test_no_detection_comes_from_steps_that_are_not_real(name: str) -> None:
    check_decoding_honours_the_mask(build(name))


def test_a_localizer_whose_decoding_ignores_the_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = build("actionformer")
    detect = blind.detect
    monkeypatch.setattr(
        blind, "detect", lambda outputs, times: detect(outputs._replace(mask=torch.ones_like(outputs.mask)), times)
    )
    with pytest.raises(AssertionError, match="lie in the padding"):
        check_decoding_honours_the_mask(blind)


@every_localizer
def test_a_label_outside_the_classes_is_an_error_that_names_both(name: str) -> None:
    localizer = build(name)
    with pytest.raises(ValueError, match=r"labelled 'fly', which is not among the 3 classes.*'dive', 'jump', 'run'"):
        localizer.loss(localizer(features(32)), [[Action(12.0, 15.0, "fly")]], [SECONDS])


@every_localizer
def test_class_agnostic_localizers_know_one_class_and_still_check_labels(name: str) -> None:
    localizer = build(name, class_agnostic=True).eval()
    assert localizer.classes == ("action",)
    outputs = localizer(features(32))
    losses = [localizer.loss(outputs, [[Action(12.0, 15.0, label)]], [SECONDS])["total"] for label in CLASSES]
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(ValueError, match="labelled 'fly'"):
        localizer.loss(outputs, [[Action(12.0, 15.0, "fly")]], [SECONDS])


@every_localizer
def test_a_few_steps_of_training_on_one_clip_find_its_actions(name: str) -> None:
    localizer = build(name).train()
    clip = features(32)
    optimizer = torch.optim.AdamW(localizer.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        total = localizer.loss(localizer(clip), [ACTIONS[:2]], [SECONDS])["total"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.5 * losses[0]
    found = localizer.eval().detect(localizer(clip), [SECONDS])[0]
    best = found.scores.argmax()
    truth = ACTIONS[[action.label for action in ACTIONS].index(CLASSES[found.labels[best]])]
    start, end = found.segments[best].tolist()
    overlap = min(end, truth.end_seconds) - max(start, truth.start_seconds)
    assert overlap / (max(end, truth.end_seconds) - min(start, truth.start_seconds)) > 0.5


@every_localizer
def test_bfloat16_weights_give_float32_losses_and_times(name: str) -> None:
    localizer = build(name).bfloat16().train()
    outputs = localizer(features(32, dtype=torch.bfloat16))
    losses = localizer.loss(outputs, [ACTIONS], [SECONDS])
    assert losses["total"].dtype == torch.float32
    losses["total"].backward()
    assert localizer.detect(outputs, [SECONDS])[0].segments.dtype == torch.float32


@every_localizer
def test_nothing_of_a_clip_that_counts_for_nothing_reaches_a_loss_or_a_gradient(name: str) -> None:
    def learned(broken: float) -> list[torch.Tensor]:
        localizer = build(name)
        outputs = localizer(features(32, 32))
        changed = {}
        for field, values in outputs._asdict().items():
            if field == "mask":
                changed[field] = values & torch.tensor([True, False])[:, None]
            elif len(values) == 2 and values.requires_grad:
                changed[field] = torch.cat([values[:1], values[1:] + broken])
        losses = localizer.loss(outputs._replace(**changed), [ACTIONS, ACTIONS], [SECONDS, SECONDS])
        losses["total"].backward()
        gradients = [one.grad for one in localizer.parameters() if one.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        return [losses["total"].detach(), *gradients]

    for sound, masked in zip(learned(0.0), learned(torch.nan), strict=True):
        torch.testing.assert_close(sound, masked, rtol=0, atol=0)


@every_localizer
@pytest.mark.parametrize("changes", [{}, {"step_supervision": 0.5}], ids=["plain", "step supervision"])
def test_class_rows_are_the_rows_that_come_with_another_class(name: str, changes: dict) -> None:
    changes = {key: value for key, value in changes.items() if key in {field.name for field in fields(KINDS[name])}}
    few, many = (
        build_localizer(tiny(name, **changes), in_channels=6, classes=[f"class {number}" for number in range(count)])
        for count in (3, 5)
    )
    sizes = {key: (len(value), len(many.state_dict()[key])) for key, value in few.state_dict().items() if value.ndim}
    rows = few.class_rows()
    assert rows == many.class_rows()
    assert rows.keys() == {key for key, (one, other) in sizes.items() if one != other}
    for key, (groups, before) in rows.items():
        assert sizes[key] == (groups * (before + 3), groups * (before + 5)), key


@every_localizer
def test_classes_that_move_to_their_rows_keep_their_logits(name: str) -> None:
    localizer, order = build(name).eval(), [2, 0, 1]
    moved = build_localizer(tiny(name), in_channels=6, classes=[CLASSES[place] for place in order]).eval()
    state = localizer.state_dict()
    for key, (groups, before) in localizer.class_rows().items():
        rows = state[key].unflatten(0, (groups, -1))
        state[key] = torch.cat([rows[:, :before], rows[:, before:][:, order]], dim=1).flatten(0, 1)
    moved.load_state_dict(state)
    were, are = localizer(features(32)), moved(features(32))
    background = were.logits.shape[-1] - len(CLASSES)
    places = [*range(background), *(background + place for place in order)]
    torch.testing.assert_close(are.logits, were.logits[..., places])
    if getattr(were, "offsets", torch.empty(0)).ndim == 4:  # per class
        torch.testing.assert_close(are.offsets, were.offsets[:, :, order])
