"""The settings that each stage may run with, and the bytes and seconds of each, for the search.

Bytes are counted on fake tensors, with one setting for all stages: everything stored, everything rebuilt, and rebuilt
in pieces of a few sizes, each without and with saved outputs. Seconds are measured on the device with the same
settings. For fewer saved outputs, or the last k units of a run stored, both are interpolated. The effects of keeping
the blocks that are not residual, and of saving attention, are measured once, with everything rebuilt, and assumed to be
the same for every other setting. States in host memory take no device memory; they cost the part of the transfer that
the next stage's compute does not hide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import ceil
from operator import le
from typing import Any

from re2tal.planning.dry_run import Trace
from re2tal.planning.search import Option
from re2tal.planning.settings import Setting, longest_run

STORED = Setting(stored=None, chunk_mebibytes=None)
REBUILT = Setting(stored=0, chunk_mebibytes=None)
KEEPING = Setting(stored=0, chunk_mebibytes=None, keep_nonresidual=True)
SAVING_ATTENTION = Setting(stored=0, chunk_mebibytes=None, saved_attention=2**16)
"""In every branch that has one."""
ON_THE_HOST = Setting(stored=0, chunk_mebibytes=None, offload=True)

Choices = list[tuple[Setting, Option]]
"""The options of one stage."""


@dataclass(frozen=True, slots=True)
class Link:
    """The link to host memory and back, as measured."""

    bytes_per_second: float
    trace: Trace
    """A step with all stages rebuilt and their states on the host."""


def options_of(
    stages: Mapping[str, Any],
    traces: Mapping[Setting, Trace],
    seconds: Mapping[Setting, Sequence[float]],
    link: Link | None,
) -> list[Choices]:
    """Every option, by stage.

    `traces` and `seconds`: by setting of all stages; `link`: None where states cannot leave the device.
    """
    found = [_in_memory(traces, seconds, s, stage=stage) for s, stage in enumerate(stages.values())]
    if link is not None:
        # By stage: bytes of states that leave the device between its forward and its backward.
        kept = zip(traces[REBUILT].kept(), link.trace.kept(), strict=True)
        states = [here - there for here, there in kept]
        for s, choices in enumerate(found):
            hidden = seconds[STORED][s + 1] if s + 1 < len(found) else 0.0
            # There and back, less what the next stage computes meanwhile.
            late = max(0.0, 2 * states[s] / link.bytes_per_second - hidden)
            # Those of the stage before arrive while this one's backward is under way.
            arriving = states[s] + (states[s - 1] if s else 0)
            choices += [
                (replace(setting, offload=True), _on_the_host(option, states[s], arriving, late))
                for setting, option in choices
                # Offloading is for stages that store no unit: see Setting.
                if setting.stored == 0 and states[s] > 0
            ]
    return found


def undominated(choices: Choices) -> Choices:
    """The choices that no other one beats in seconds and in all bytes."""
    # Once each: a stage of many units has hundreds of choices, and each is compared with all others.
    costs = [astuple(option) for _, option in choices]
    return [
        choice
        for choice, mine in zip(choices, costs, strict=True)
        # Of two that are equal in all, both stay: neither beats the other.
        if not any(other != mine and all(map(le, other, mine)) for other in costs)
    ]


def _in_memory(
    traces: Mapping[Setting, Trace], seconds: Mapping[Setting, Sequence[float]], s: int, *, stage: Any
) -> Choices:
    measured = {setting: _measured(trace, seconds[setting], s) for setting, trace in traces.items()}
    stored, keeping, saving = measured.pop(STORED), measured.pop(KEEPING, None), measured.pop(SAVING_ATTENTION, None)
    length = longest_run(stage)
    # With many stages a few steps each are choice enough.
    steps = length if len(traces[STORED].of("forward")) <= 2 else min(length, 4)
    rebuilt = _with_saved_outputs(measured, most=length - 1)  # the first branch's output is never read
    none = measured[REBUILT]
    # This stage may have no attention where others have some.
    if saving is not None and saving.kept > none.kept:
        attention = SAVING_ATTENTION.saved_attention
        rebuilt += [
            (replace(setting, saved_attention=attention), _changed(option, none, saving)) for setting, option in rebuilt
        ]
    ways = [(rebuilt, stored)]
    if keeping is not None and stage.can_checkpoint_nonresidual():
        also_kept = [
            (replace(setting, keep_nonresidual=True), _changed(option, none, keeping)) for setting, option in rebuilt
        ]
        # "Stored" keeps the blocks that are not residual too; without those, that difference comes off.
        ways = [(rebuilt, _changed(stored, keeping, none)), (also_kept, stored)]
    return [(STORED, stored)] + [
        (replace(setting, stored=units), _between(option, all_stored, units / length))
        for choices, all_stored in ways
        for setting, option in choices
        for units in (length * step // steps for step in range(steps))
    ]


def _with_saved_outputs(measured: Mapping[Setting, Option], *, most: int) -> Choices:
    """The measured options, without saved outputs and with as many as are worth it, and a quarter, half and three
    quarters of these.

    All stages are measured with the same number of saved outputs; a run has at most `most` of them.
    """
    found = list(measured.items())
    for setting, option in measured.items():
        none = measured[replace(setting, known=0)]
        measured_with = min(setting.known, most)
        for known in sorted({measured_with * quarters // 4 for quarters in range(1, 4)} - {0}):
            found.append((replace(setting, known=known), _mixed(none, option, known / measured_with)))
    return found


def _mixed(none: Option, most: Option, share: float) -> Option:
    pairs = zip(astuple(none), astuple(most), strict=True)
    seconds, *sizes = (one + share * (other - one) for one, other in pairs)
    # Rounded up, so that a plan never needs more than it was counted with.
    return Option(seconds, *(ceil(size) for size in sizes))


def _changed(option: Option, before: Option, after: Option) -> Option:
    """`option` with the difference that `after` makes to `before`."""
    seconds, *sizes = (a + c - b for a, b, c in zip(astuple(option), astuple(before), astuple(after), strict=True))
    # Differences of measured times may come out negative.
    return Option(max(0.0, seconds), *(max(0, size) for size in sizes))


def _measured(trace: Trace, seconds: Sequence[float], s: int) -> Option:
    forward, backward = trace.of("forward")[s], trace.of("backward")[s]
    return Option(seconds[s], trace.kept()[s], forward.peak - forward.live, backward.peak - backward.live)


def _between(rebuilt: Option, stored: Option, share: float) -> Option:
    """The option with the last `share` of the units stored. Their memory is free again in the others' backward."""
    kept = round(share * (stored.kept - rebuilt.kept))
    return Option(
        rebuilt.seconds + share * (stored.seconds - rebuilt.seconds),
        rebuilt.kept + kept,
        max(rebuilt.forward, rebuilt.kept + kept),
        max(stored.backward if share else 0, rebuilt.backward - kept),
    )


def _on_the_host(option: Option, states: int, arriving: int, late: float) -> Option:
    return replace(
        option, seconds=option.seconds + late, kept=option.kept - states, backward=option.backward + arriving
    )
