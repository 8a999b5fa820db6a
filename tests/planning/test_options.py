"""What is offered for a stage that nobody measured lies between what was, in proportion."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

from re2tal.planning import options
from re2tal.planning.dry_run import Event, Phase, Trace
from re2tal.planning.options import KEEPING, REBUILT, STORED, options_of, undominated
from re2tal.planning.search import Option

STATE = 100


def trace(*kept: int, inside: int = 900) -> Trace:
    live = [sum(kept[:s]) for s in range(len(kept) + 1)]
    forward = [Phase(Event("forward", s), live[s], live[s] + 500, 0) for s in range(len(kept))]
    backward = [Phase(Event("backward", s), live[s + 1], live[s + 1] + inside, 0) for s in range(len(kept))]
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


def test_what_keeping_other_blocks_changes_it_changes_with_every_other_setting() -> None:
    """They take 12 states and save 0.2 s, of the 40 states and 0.8 s of a stage that is stored as a whole."""
    stages = {
        str(has): SimpleNamespace(runs=lambda: [([], [4])], can_checkpoint_nonresidual=lambda has=has: has)
        for has in (True, False)
    }
    pieces = replace(REBUILT, chunk_mebibytes=8.0)
    traces = {
        STORED: trace(40 * STATE, 40 * STATE),
        REBUILT: trace(2 * STATE, 2 * STATE),
        pieces: trace(2 * STATE, 2 * STATE, inside=700),
        KEEPING: trace(14 * STATE, 2 * STATE),
    }
    seconds = dict(zip(traces, ((2.0, 2.0), (2.8, 2.8), (2.9, 2.9), (2.6, 2.8)), strict=True))
    having, others = (dict(choices) for choices in options_of(stages, traces, seconds, None))
    assert not any(setting.keep_nonresidual for setting in others)
    found = {setting: (round(option.seconds, 6), option.kept, option.backward) for setting, option in having.items()}
    assert found[KEEPING] == (2.6, 1400, 900)
    assert found[replace(pieces, keep_nonresidual=True)] == (2.7, 1400, 700)
    # One unit in four: of 40 states 12 are not theirs.
    assert found[replace(REBUILT, stored=1)] == (2.65, 200 + (40 - 12 - 2) * STATE // 4, 900)
    assert found[replace(KEEPING, stored=1)] == (2.45, 1400 + (40 - 14) * STATE // 4, 900)


def test_what_another_choice_beats_goes_equals_stay_and_each_is_taken_apart_once(monkeypatch) -> None:
    """A single stage of many units has more than a thousand choices, each compared with all: seconds, not minutes."""
    apart = Mock(side_effect=options.astuple)
    monkeypatch.setattr(options, "astuple", apart)
    best, less_kept, worse = Option(1.0, 5, 3, 3), Option(2.0, 4, 3, 3), Option(1.0, 5, 4, 3)
    choices = [(STORED, worse), (REBUILT, best), (KEEPING, replace(best)), (STORED, less_kept)]
    assert undominated(choices) == choices[1:]
    assert apart.call_count == len(choices)
