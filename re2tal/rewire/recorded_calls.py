"""How the residual blocks of a network are called on an example, in the plain network and in the rewired one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from re2tal.reversible.buffers import buffers_restored
from re2tal.reversible.precision import dense
from re2tal.reversible.rng import GeneratorState
from re2tal.rewire.branches import hidden_state
from re2tal.rewire.discover import in_mode
from re2tal.rewire.outputs import relative_error
from re2tal.rewire.pending import BlockCall, RewireError, split_call
from re2tal.rewire.reads import numbers_of
from re2tal.rewire.stage import RewiredStage


@dataclass(slots=True)
class CallRecorder:
    """What an example shows of how blocks are called. Set in the stages of a network, it runs every block at once."""

    ends: dict[RewiredStage, set[str]] = field(default_factory=dict)
    """Blocks whose output is used by something else than the next block."""
    calls: list[Called] = field(default_factory=list)
    save_states: bool = False
    """Whether `calls` saves states."""
    check_replay: bool = False
    """Whether each block must give the same when it runs again, in training mode, as it does in backward."""

    def run(self, stage: RewiredStage, calls: tuple[BlockCall, ...], x: Tensor) -> Tensor:
        """Computes the one call in `calls`."""
        (call,) = calls
        output = stage.run(calls, x)
        if self.check_replay and stage.config.recompute:
            _check_again(stage, call, x)
        states = (x, output) if self.save_states else ()
        self.calls.append(Called.now(stage.get_submodule(call.name), stage.name_of(call.name), *states))
        return output

    def end_run_behind(self, stage: RewiredStage, name: str) -> None:
        """Notes that the state behind a block is used."""
        self.ends.setdefault(stage, set()).add(name)


class Called(NamedTuple):
    """One call of a residual block."""

    block: nn.Module
    name: str
    states: list[Tensor]
    """Its input and its output, where they are saved."""

    @classmethod
    def now(cls, block: nn.Module, name: str, *states: Tensor) -> Called:
        """With copies of the states: a run, and some models, write into the memory of older ones."""
        return cls(block, name, [state.detach().clone() for state in states])


def _check_again(stage: RewiredStage, call: BlockCall, x: Tensor) -> None:
    """Raises RewireError if the block, in training mode, gives another output when it runs a second time.

    So it does if the block leaves a tensor behind; see `escapes`.
    """
    block, draws = stage.get_submodule(call.name), GeneratorState.now(x.device)
    results, numbers = [], []
    try:
        for _ in range(2):
            with (
                torch.enable_grad(),
                in_mode(block, training=True),
                buffers_restored(block.modules()),
                draws.replayed(),
            ):
                results.append(stage.run((call,), x))
                numbers.append(numbers_of(block))
    except RewireError:
        raise
    except Exception as error:
        raise RewireError(
            f"block {stage.name_of(call.name)} fails on the example in training mode: {type(error).__name__}: {error}"
        ) from error
    if results[0].shape != results[1].shape or relative_error(*results) > 64 * torch.finfo(x.dtype).eps:
        raise RewireError(
            f"block {stage.name_of(call.name)} ({type(block).__name__}) gives another output when it runs again with "
            "the same input, draws and buffers: it reads something that it writes (a cache that it is called with, an "
            "attribute), or draws from a generator of its own; backward could not run it again"
        )
    if changed := [name for name, value in numbers[1].items() if numbers[0].get(name) != value]:
        raise RewireError(
            f"block {stage.name_of(call.name)} ({type(block).__name__}) changes its {changed[0]} "
            "every time it runs, and it runs twice in a step; let it count in a buffer"
        )


@contextmanager
def recording(stages: Sequence[RewiredStage], recorder: CallRecorder) -> Iterator[CallRecorder]:
    """Inside, every block of the stages runs at once, and `recorder` takes note of it."""
    for stage in stages:
        stage.recorder = recorder
    try:
        yield recorder
    finally:
        for stage in stages:
            stage.recorder = None


@contextmanager
def plain_calls(stages: Sequence[RewiredStage], *, save_states: bool) -> Iterator[list[Called]]:
    """Yields the calls of the blocks that are residual in the rewired model, while the plain one runs."""
    names = {stage.get_submodule(name): stage.name_of(name) for stage in stages for name in stage.residual}
    calls: list[Called] = []

    def note(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        states = (split_call(block, args, kwargs)[0], hidden_state(output)) if save_states else ()
        calls.append(Called.now(block, names[block], *states))

    def lay_out(block: nn.Module, args: tuple) -> tuple:
        """As a run does: sums in float32 inside of a block depend on it."""
        return (dense(args[0]), *args[1:]) if args and isinstance(args[0], Tensor) else args

    with ExitStack() as stack:
        for block in names:
            stack.callback(block.register_forward_pre_hook(lay_out).remove)
            stack.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        yield calls
