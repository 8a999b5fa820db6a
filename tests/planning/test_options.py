"""What is offered for a stage that nobody measured lies between what was, in proportion."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from re2tal.planning.options import REBUILT, STORED, options_of
from re2tal.planning.rehearsal import Event, Phase, Trace

STATE = 100


def trace(*kept: int) -> Trace:
    live = [sum(kept[:s]) for s in range(len(kept) + 1)]
    forward = [Phase(Event("forward", s), live[s], live[s] + 500, 0) for s in range(len(kept))]
    backward = [Phase(Event("backward", s), live[s + 1], live[s + 1] + 900, 0) for s in range(len(kept))]
    return Trace(0, (*forward, Phase(Event("between", 0), live[-1], live[-1], 0), *backward))


def test_a_short_stage_knows_all_it_can_long_before_the_longest_does() -> None:
    """Of 4 and 24 units, with 12 branches known each: 3 in the short stage, whose first one's is of no use."""
    stages = {str(length): SimpleNamespace(runs=lambda length=length: [([], [length])]) for length in (4, 24)}
    traces = {
        STORED: trace(4 * 10 * STATE, 24 * 10 * STATE),
        REBUILT: trace(2 * STATE, 2 * STATE),
        replace(REBUILT, known=12): trace((2 + 3) * STATE, (2 + 12) * STATE),
    }
    seconds = dict(zip(traces, ((1.0, 6.0), (1.6, 9.6), (1.3, 8.4)), strict=True))
    short, long = (
        {setting.known: option for setting, option in choices if setting.stored == 0}
        for choices in options_of(stages, traces, seconds, None)
    )
    assert {known: option.kept for known, option in short.items()} == {0: 200, 1: 300, 2: 400, 12: 500}
    assert {known: option.kept for known, option in long.items()} == {0: 200, 3: 500, 6: 800, 9: 1100, 12: 1400}
    assert [round(option.seconds, 6) for _, option in sorted(short.items())] == [1.6, 1.5, 1.4, 1.3]
