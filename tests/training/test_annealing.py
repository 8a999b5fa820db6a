"""Beta, step by step, worked by hand."""

from __future__ import annotations

import dataclasses

import pytest

from re2tal.config import RunConfig
from re2tal.training.annealing import AnnealingConfig, beta_course


def test_beta_rises_evenly_and_stays_at_its_end():
    course = beta_course(AnnealingConfig(epochs=2), end=1.0, steps_per_epoch=2, num_steps=6)
    assert [course(step) for step in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_beta_may_start_and_end_anywhere():
    course = beta_course(AnnealingConfig(epochs=0.5, start=0.9), end=0.5, steps_per_epoch=4, num_steps=2)
    assert [course(step) for step in range(3)] == pytest.approx([0.9, 0.7, 0.5])


def test_beta_ends_at_the_very_number_that_the_trained_network_is_built_with():
    course = beta_course(AnnealingConfig(epochs=1, start=0.2), end=0.9, steps_per_epoch=3, num_steps=3)
    assert 0.2 + (0.9 - 0.2) != 0.9
    assert course(3) == 0.9


def test_without_epochs_there_is_no_course():
    assert beta_course(AnnealingConfig(), end=0.5, steps_per_epoch=4, num_steps=2) is None


def test_a_run_that_would_end_on_the_way_is_refused():
    with pytest.raises(ValueError, match=r"annealing.epochs = 2 is 8 steps, but the run has only 6; shorten it"):
        beta_course(AnnealingConfig(epochs=2), end=1.0, steps_per_epoch=4, num_steps=6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": -1.0}, "annealing.epochs is -1.0; give 0 or more"),
        ({"epochs": float("inf")}, "annealing.epochs is inf; give 0 or more"),
        ({"start": 1.5}, "annealing.start is 1.5; give a number from 0 to 1"),
    ],
)
def test_values_without_meaning_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AnnealingConfig(**fields)


def test_a_plain_backbone_has_nothing_to_anneal():
    config = RunConfig()
    plain = dataclasses.replace(config.backbone, rewired=False)
    with pytest.raises(ValueError, match=r"annealing.epochs is 2, but the backbone is not rewired"):
        dataclasses.replace(config, backbone=plain, annealing=AnnealingConfig(epochs=2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.5),
        ("segment", 2),
        ("chunk_mebibytes", 8.0),
        ("known", 1),
        ("keep_nonresidual", True),
        ("offload", True),
        ("states", "int32"),
    ],
)
def test_settings_of_a_rewired_backbone_are_refused_where_it_is_plain(name, value):
    config = RunConfig()
    plain = dataclasses.replace(config.backbone, rewired=False, **{name: value})
    with pytest.raises(ValueError, match=f"backbone.{name} is {value!r}, but the backbone is not rewired"):
        dataclasses.replace(config, backbone=plain)
