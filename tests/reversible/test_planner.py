"""The search finds what trying all choices finds."""

from __future__ import annotations

import random
from itertools import product

import pytest
from planning.peaks import peak_of

from re2tal.planning.search import Ground, Option, fastest, smallest


def problem(seed: int) -> tuple[Ground, list[list[Option]]]:
    draw = random.Random(seed)
    num_stages = draw.randint(1, 4)
    ground = Ground(
        draw.randint(0, 30),
        tuple(draw.randint(0, 20) for _ in range(num_stages)),
        draw.randint(0, 30),
        tuple(draw.randint(0, 20) for _ in range(num_stages)),
    )
    stages = [
        [
            Option(draw.randint(1, 9), draw.randint(0, 20), draw.randint(0, 20), draw.randint(0, 40))
            for _ in range(draw.randint(1, 5))
        ]
        for _ in range(num_stages)
    ]
    return ground, stages


def tried(ground: Ground, stages: list[list[Option]]) -> list[tuple[int, float]]:
    """(peak, seconds) of every choice."""
    return [(peak_of(ground, options), sum(option.seconds for option in options)) for options in product(*stages)]


@pytest.mark.parametrize("seed", range(60))
def test_the_fastest_within_a_budget_is_the_one_that_trying_all_finds(seed) -> None:
    ground, stages = problem(seed)
    every = tried(ground, stages)
    for budget in sorted({peak for peak, _ in every}):
        wanted = min(seconds for peak, seconds in every if peak <= budget)
        found = fastest(ground, stages, budget=budget)
        assert found is not None
        assert found.seconds == wanted
        assert found.peak <= budget
        chosen = [options[number] for options, number in zip(stages, found.options, strict=True)]
        assert peak_of(ground, chosen) == found.peak


@pytest.mark.parametrize("seed", range(60))
def test_the_smallest_is_the_one_that_trying_all_finds(seed) -> None:
    ground, stages = problem(seed)
    found = smallest(ground, stages)
    assert (found.peak, found.seconds) == min(tried(ground, stages))
    assert fastest(ground, stages, budget=found.peak - 1) is None


def test_a_peak_worked_by_hand() -> None:
    ground = Ground(before=5, forward=(10, 10), between=3, backward=(12, 12))
    stored, rebuilt = Option(1, 50, 52, 4), Option(2, 8, 20, 30)
    assert peak_of(ground, [stored, stored]) == 12 + 100 + 4
    assert peak_of(ground, [rebuilt, stored]) == 10 + 8 + 52 + 4
    assert peak_of(ground, [rebuilt, rebuilt]) == 12 + 16 + 30
