"""A stage of a rewired network: the container of its blocks, which runs them reversibly.

    plain        x -> block 0 -> block 1 -> ... -> block n-1
    rewired      x -> downsampling block -> [reversible run over the branches of blocks 1 .. n-1] -> merge

It takes the place of an `nn.Sequential`, which is called, or of an `nn.ModuleList`, whose blocks a parent calls:

    for layer, mask in zip(self.layers, masks):     # handles; each block keeps the arguments that it is called with,
        x = layer(x, mask)                          # and the last one of a run computes all of it (see `pending`)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from re2tal.reversible import run_reversibly
from re2tal.reversible.monitor import FirstCheck, Monitor
from re2tal.reversible.offload import offloaded
from re2tal.rewire.branches import Residual, hidden_state, is_unregistered, registered
from re2tal.rewire.config import RewiringConfig
from re2tal.rewire.containers import own_attribute, own_names
from re2tal.rewire.escapes import is_compiled
from re2tal.rewire.hooks import FOR_ALL, called_with, check_hooks, check_kind, guard, has_hooks, hooked_inside, unguard
from re2tal.rewire.lost_gradients import refuse_lost_gradients
from re2tal.rewire.nonresidual import recomputed
from re2tal.rewire.pending import NESTED, BlockCall, BlockHandle, PendingState, RewireError, values_of
from re2tal.rewire.recomputed_inputs import saving_recipe
from re2tal.rewire.runs_of_stage import bounds_of, coupling_of, lengths_of_runs, names_of_runs
from re2tal.rewire.units import Unit, unit_checked_for_escapes, units_of

if TYPE_CHECKING:
    from re2tal.rewire.recorded_calls import CallRecorder


class RewiredStage(nn.Module):
    """The blocks of one stage under their old names; each unbroken sequence of residual ones is run reversibly."""

    def __init__(
        self, plain: nn.Module, config: RewiringConfig, *, residual: Mapping[str, Residual], path: str = ""
    ) -> None:
        """`residual` holds the residual blocks by name; other blocks run unchanged. `path` is for messages."""
        super().__init__()
        self.config = config
        self.path = path
        self.residual = dict(residual)
        self.kinks = any(found.kinks for found in residual.values())
        self.monitor = None if config.monitor_every is None else Monitor(path, every=config.monitor_every)
        self._first_check = FirstCheck(path)
        self._checked: set[tuple] = set()
        """Kinds of runs whose branches were found to leave nothing behind."""
        self.ends: Collection[str] = frozenset()
        """Residual blocks behind which a run ends although the next one is residual: somebody uses the state there."""
        self.recorder: CallRecorder | None = None
        """Set while an example shows how blocks are called."""
        self._plain = (plain,)  # in a tuple, so that it is not a submodule: its children are ours
        self._first = 0  # where in the stage the last run started
        self.training = plain.training
        for name, block in plain._modules.items():  # a block that hangs there twice has two names
            self.add_module(name, block)
        self._kinds = {name: type(self.get_submodule(name)) for name in residual}
        self.guard()

    def __getattr__(self, name: str) -> Any:
        (plain,) = vars(self).get("_plain", (None,))
        has = plain is not None and name in own_names(plain)
        return own_attribute(plain, name, self) if has else super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """For pickles: registrations are asked once more where they are loaded, as their functions need have no name.

        Raises TypeError for blocks that were taken apart, whose branches are code without a file.
        """
        found = {name: registered(self.get_submodule(name)) for name in self.residual}
        if lost := [self.name_of(name) for name, one in found.items() if not isinstance(one, Residual)]:
            raise TypeError(
                f"a rewired model cannot be pickled where blocks were taken apart by what they do ({lost[0]}): save "
                "its state_dict(), unrewire it before, or register residual_branches for its type of block"
            )
        return vars(self) | {"residual": list(self.residual)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        found = {name: registered(self.get_submodule(name)) for name in state["residual"]}
        self.residual = {name: one for name, one in found.items() if isinstance(one, Residual)}
        if len(self.residual) < len(found):
            raise TypeError(f"a block of rewired stage {self.path} is registered as residual no more; rewire it anew")

    def __deepcopy__(self, memo: dict[int, Any]) -> RewiredStage:
        # Not by way of `__getstate__`: in one process a copy may keep branches that are code without a file.
        other = memo[id(self)] = type(self).__new__(type(self))
        vars(other).update(deepcopy(vars(self), memo))
        return other

    def guard(self) -> None:
        """Makes calls of residual blocks that do not come from here an error."""
        for name in self.residual:
            guard(self.get_submodule(name), self.name_of(name))

    def runs(self) -> Iterator[tuple[list[nn.Module], list[int]]]:
        """The blocks of each unbroken residual sequence, and the number of units in each of its reversible runs."""
        for names in names_of_runs(self):
            yield [self.get_submodule(name) for name in names], lengths_of_runs(self, names)

    def can_checkpoint_nonresidual(self) -> bool:
        """Whether `keep_nonresidual` changes anything here."""
        return any(not is_unregistered(one) for name, one in self.named_children() if name not in self.residual)

    def names(self) -> list[str]:
        """Of the blocks, in order."""
        return list(self._modules)

    def name_of(self, block: str) -> str:
        """The whole name of a block, for messages."""
        return f"{self.path}.{block}" if self.path else block

    def run_ends(self) -> set[str]:
        """The residual blocks that end a run."""
        following = dict(pairwise(self.names()))
        return {name for name in self.residual if name in self.ends or not self._is_one_run(name, following.get(name))}

    def _is_one_run(self, name: str, following: str | None) -> bool:
        return following in self.residual and self.residual[following].streams == self.residual[name].streams

    @torch._disable_dynamo
    def forward(self, x: Tensor, *args: Any, _calls: tuple[BlockCall, ...] | None = None, **kwargs: Any) -> Any:
        """Runs all blocks on x, with the same further arguments; or computes the `_calls` that a run is made of.

        Returns what the last block returns; for `_calls` of a run, the hidden state alone.
        """
        if _calls is not None:
            return self._compute(x, _calls)
        output: Any = x
        for name in self._modules:
            output = self.call_block(name, hidden_state(output), args, kwargs, compute=self._compute)
        return output

    def call_block(
        self, name: str, x: Tensor, args: tuple, kwargs: dict[str, Any], *, compute: Callable[..., Any] | None = None
    ) -> Any:
        """What the block called `name` returns for x: computed where it ends a run, and else pending.

        `compute` runs what ends here. By default it calls this module, so that the module's hooks run too.
        """
        compute = compute or self._as_a_module
        block, call = self.get_submodule(name), partial(self._call_block, name, compute)
        if name in self.residual:
            check_kind(block, self._kinds[name], self.name_of(name))
            if isinstance(x, Tensor) and x.is_nested:
                raise RewireError(f"block {self.name_of(name)} is called with {NESTED}")
        if name not in self.residual or not has_hooks(block):
            return call(x, *args, **kwargs)
        check_hooks(block, self.name_of(name))
        return called_with(block, call, x, args, kwargs)

    def _as_a_module(self, x: Tensor, calls: tuple[BlockCall, ...]) -> Any:
        """`_compute` with the hooks of this module, but without hooks on all modules: its parent called a block."""
        return called_with(self, partial(type(self).forward, self), x, (), {"_calls": calls}, hidden=FOR_ALL)

    def _call_block(self, name: str, compute: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # A state that is passed besides x is used for its values: a run must end there.
        if any(isinstance(leaf, PendingState) for leaf in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(values_of, (args, kwargs))
        calls: tuple[BlockCall, ...] = (BlockCall.of(name, args, kwargs),)
        if name not in self.residual:
            return compute(values_of(x), calls)
        if isinstance(x, PendingState) and x.run.goes_on(self) and self._is_one_run(x.run.calls[-1].name, name):
            x.run.taken = True  # a second block that is called with this state needs its values
            # While an example is run, every block is computed when it is called, from the state before it.
            start, calls = (x.run.start, (*x.run.calls, *calls)) if x.run.computed is None else (x.run.computed, calls)
        else:
            start = values_of(x)
        ends = name in self.run_ends()
        computed = compute(start, calls) if ends or self.recorder is not None else None
        output: Any = computed if ends else PendingState.behind(self, start, calls, computed)
        return self.residual[name].wrap(self.get_submodule(name), output)

    def _compute(self, x: Tensor, calls: tuple[BlockCall, ...]) -> Any:
        first = calls[0]
        if self.config.recompute and torch.is_grad_enabled():
            place = self.names().index(first.name)
            if place <= self._first:  # not the second run of one forward
                for monitor in (self.monitor, self._first_check):
                    if monitor is not None:
                        monitor.step()
            self._first = place
        if first.name in self.residual:
            return self.run(calls, x) if self.recorder is None else self.recorder.run(self, calls, x)
        block = self.get_submodule(first.name)
        # It must compute the same when it runs twice. Only a registration says that it does.
        if not self.config.recompute or is_unregistered(block):
            return block(x, *first.args, **first.kwargs)
        if self.config.keep_nonresidual:
            with saving_recipe(block, x):
                return block(x, *first.args, **first.kwargs)
        return recomputed(block, x, *first.args, owner=block, **first.kwargs)

    def _monitor(self) -> Monitor | None:
        """The first step is checked in any case: it keeps a sample of a state, and its backward waits for it."""
        self._first_check.monitor = self.monitor
        return self.monitor if self._first_check.done else self._first_check

    def run(self, calls: tuple[BlockCall, ...], x: Tensor) -> Tensor:
        """Computes a reversible run over the branches of some blocks; its segments, where the configuration has any."""
        kind = None
        if self.config.recompute and torch.is_grad_enabled():
            for call in calls:
                refuse_lost_gradients(self.get_submodule(call.name), call, self.name_of(call.name))
            kind = self._to_be_checked(calls)
        units = [(self.get_submodule(call.name), unit) for call in calls for unit in self._units(call)]
        streams = self.residual[calls[0].name].streams
        if kind is not None:
            # Where states are saved and not rebuilt, backward does not show that a branch gives something else.
            saves_states = not coupling_of(self.config, streams=streams).is_sum
            again = saves_states and self.recorder is None and not hooked_inside(self._blocks(calls))
            units = [
                (block, unit_checked_for_escapes(unit, stage=self.path, repeated=block if again else None))
                for block, unit in units
            ]
        for first, last in pairwise(bounds_of(self.config, [block for block, _ in units], streams=streams)):
            blocks, branches = zip(*units[first:last], strict=True)
            # One context per run: prefetching follows the order of runs.
            with offloaded(x) if self.config.offload else nullcontext():
                x = run_reversibly(
                    branches,
                    x,
                    recompute=self.config.recompute,
                    saved_branches=self.config.stored,
                    saved_outputs=self.config.known,
                    saved_attention=self.config.saved_attention,
                    merge=self.config.merge,
                    streams=streams,
                    coupling=coupling_of(self.config, streams=streams),
                    states=self.config.states,
                    grid=self.config.grid,
                    kinks=self.kinks,
                    owner=nn.ModuleList(dict.fromkeys(blocks)),  # not all of the stage: others are not run here
                    monitor=self._monitor(),
                )
        if kind is not None and self.recorder is None:
            self._checked.add(kind)  # only now: a run that raised is checked again
        return x

    def _to_be_checked(self, calls: tuple[BlockCall, ...]) -> tuple | None:
        """A key for how these blocks run, if that must be checked: the first time, or if hooks may collect outputs."""
        blocks = self._blocks(calls)
        kind = tuple((call.name, block.training, call.constants()) for call, block in zip(calls, blocks, strict=True))
        done = kind in self._checked and not hooked_inside(blocks)
        left_out = self.recorder is not None and not self.recorder.check_replay
        return None if left_out or done or any(map(is_compiled, blocks)) else kind

    def _blocks(self, calls: tuple[BlockCall, ...]) -> list[nn.Module]:
        return [self.get_submodule(call.name) for call in calls]

    def _units(self, call: BlockCall) -> list[Unit]:
        block, name = self.get_submodule(call.name), self.name_of(call.name)
        return units_of(block, self.residual[call.name], self.config, call=call, name=name)

    def plain(self) -> nn.Module:
        """The container that this stage stands for, with this stage's blocks in it."""
        (plain,) = self._plain
        plain.training = self.training
        for name, block in self._modules.items():
            plain.add_module(name, block)
        for name in self.residual:
            unguard(self.get_submodule(name))
        return plain

    def __iter__(self) -> Iterator[BlockHandle]:
        if torch.compiler.is_compiling():
            torch._dynamo.skip_frame("blocks of a rewired stage are called one by one")
        return (BlockHandle(self, name, self.get_submodule(name)) for name in self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int | slice) -> BlockHandle | list[BlockHandle] | RewiredStage:
        if torch.compiler.is_compiling():
            torch._dynamo.skip_frame("blocks of a rewired stage are called one by one")
        handles = list(self)
        if isinstance(index, int):
            return handles[index]
        if range(len(self))[index] == range(len(self)):
            return self  # as for `self.layers[:num_layers]`
        if isinstance(self._plain[0], nn.Sequential):
            raise RewireError(
                f"{index} of the rewired nn.Sequential {self.path} cannot be run; iterate over the blocks"
            )
        return handles[index]

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.config}"


def stages_of(model: nn.Module) -> dict[str, RewiredStage]:
    """The rewired stages in `model` by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RewiredStage)}
