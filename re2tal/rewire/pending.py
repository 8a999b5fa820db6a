"""Blocks of a rewired stage as its parent calls them, one by one; a run is computed when its last block is called.

    for layer, mask in zip(self.layers, masks):      layer is a BlockHandle
        x = layer(x, mask)                           x is a PendingState until the run ends

A call of a handle only notes the block and its arguments. What it returns knows shape, dtype and device, and has no
values. Somebody who wants them ends a run there: `rewire` finds these places with an example and they become ends of
runs (`RewiredStage.ends`). Elsewhere it is an error, because a network whose runs end where somebody happens to look
would be another network each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from re2tal.rewire.stage import RewiredStage


class RewireError(ValueError):
    """The rewired network would not be the network that was given; it says where, why and what to do."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """`block(x, *args, **kwargs)`, noted."""

    name: str
    """Of the block in its stage."""
    args: tuple
    kwargs: dict[str, Any]
    given: tuple[tuple[Any, int], ...]
    """The leaves of the arguments, and versions. A call that is run late must find them as they were."""

    @classmethod
    def of(cls, name: str, args: tuple, kwargs: dict[str, Any]) -> BlockCall:
        """A call that is made now."""
        return cls(name, args, kwargs, _leaves_of(args, kwargs))

    def constants(self) -> tuple:
        """The numbers, flags and names among its arguments."""
        plain = (bool, int, float, str, NoneType)
        return tuple(leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, plain))

    def check(self, block: str) -> None:
        """Raises RewireError where somebody has written into its arguments since."""
        now = _leaves_of(self.args, self.kwargs)
        # By identity: a list may hold another tensor, of as many writes, by the time the run is computed.
        if len(now) != len(self.given) or any(
            one is not was or version != before for (one, version), (was, before) in zip(now, self.given, strict=True)
        ):
            raise RewireError(
                f"an argument of block {block} was written to after the block was called: before its run ended, or "
                "before backward, which runs it again; give every call a tensor of its own"
            )


def split_call(block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
    """(hidden state, other arguments, others by name) of a call; the state is the first argument, or None."""
    if args:
        return args[0], args[1:], dict(kwargs)
    name = next(iter(signature(block.forward).parameters), None)
    return kwargs.get(name) if name else None, (), {key: value for key, value in kwargs.items() if key != name}


NESTED = (
    "nested tensors, which have no sizes that a run could be made of (nn.TransformerEncoder makes them of a padding "
    "mask in evaluation mode: give it enable_nested_tensor=False)"
)


@dataclass(slots=True, eq=False)
class PendingRun:
    """A run that has not ended yet."""

    stage: RewiredStage
    start: Tensor
    """The state that the run starts with."""
    calls: tuple[BlockCall, ...]
    """The blocks so far."""
    computed: Tensor | None
    """The state behind them, only while an example is run."""
    version: int
    """Of `start`. A run that is computed late must find it as it was."""
    settings: tuple
    """Under which the calls were made."""
    taken: bool = False
    """Whether the next block was called."""

    def goes_on(self, stage: RewiredStage) -> bool:
        """Whether a block of `stage` that is called now may be the next one."""
        if self.computed is None and self.version != _version(self.start):
            raise RewireError(
                f"the state before block {stage.name_of(self.calls[0].name)} was written to in place before its run "
                "ended; write to a copy of it"
            )
        return self.stage is stage and not self.taken and self.settings == _settings(self.start)


class PendingState(Tensor):
    """The state behind a block whose run goes on: a shape without values."""

    run: PendingRun

    @staticmethod
    def behind(
        stage: RewiredStage, start: Tensor, calls: tuple[BlockCall, ...], computed: Tensor | None = None
    ) -> PendingState:
        """After the last of `calls`."""
        state: PendingState = Tensor._make_wrapper_subclass(
            PendingState,
            start.size(),
            strides=start.stride(),
            dtype=start.dtype,
            device=start.device,
            requires_grad=torch.is_grad_enabled(),
        )
        state.run = PendingRun(stage, start, calls, computed, _version(start), _settings(start))
        return state

    def __repr__(self) -> str:  # type: ignore[override]
        """Without values."""
        return f"PendingState(behind {self.run.stage.name_of(self.run.calls[-1].name)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers for shape, dtype and device; anything else wants values."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map(values_of, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Reached only from inside torch."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        args, kwargs = tree_map(values_of, (args, kwargs or {}))
        return func(*args, **kwargs)


def values_of(state: Any) -> Any:
    """The values of a pending state; anything else is returned as it is.

    While an example is run, asking for them ends the run there. At any other time it raises RewireError.
    """
    if not isinstance(state, PendingState):
        return state
    run = state.run
    stage, name = run.stage, run.calls[-1].name
    if run.computed is None:
        raise RewireError(
            f"the state behind block {stage.name_of(name)} is used by something else than the next block (a hidden "
            "state that is returned, a hook that reads it, a skip across blocks, a block that is left out, a "
            "checkpoint around blocks, which they need no more), but the run goes on there; rewire the plain model "
            "with an example in which it is used, rewire(model, example=..), so that a run ends there"
        )
    assert stage.recorder is not None
    stage.recorder.end_run_behind(stage, name)
    return run.computed


class BlockHandle:
    """A block of a rewired stage, in the place of the block itself: called like it, with its attributes."""

    def __init__(self, stage: RewiredStage, name: str, block: nn.Module) -> None:
        # Past __setattr__ below, and in no slots: torch.compile takes those for missing and asks __getattr__ for ever.
        self.__dict__.update(_stage=stage, _name=name, _block=block)

    @torch._disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block would, with a pending state in the place of its hidden state while the run goes on."""
        x, args, kwargs = split_call(self._block, args, kwargs)
        return self._stage.call_block(self._name, x, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # A parent that calls `layer.forward(x)` must not run the block on a state without values.
        return self if name == "forward" else getattr(self._block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            raise RewireError(
                f"the forward of block {self._name} of {self._stage.path} cannot be replaced: unrewire first"
            )
        setattr(self._block, name, value)

    def __iter__(self) -> Iterator[nn.Module]:
        raise TypeError(
            f"block {self._name} of {self._stage.path} is no module here (fully_shard and the like want one): take it "
            f"from the stage, .get_submodule({self._name!r}), or do this before rewiring"
        )

    def __repr__(self) -> str:
        return f"block {self._stage.name_of(self._name)}: {self._block!r}"


def _leaves_of(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple[Any, int], ...]:
    leaves = tree_leaves((args, kwargs))
    return tuple((leaf, _version(leaf) if isinstance(leaf, Tensor) else 0) for leaf in leaves)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _settings(x: Tensor) -> tuple:
    """What a parent may switch between two blocks. One run would compute both under the last setting."""
    kind = x.device.type
    return torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


_GETTERS = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta", "layout", "is_sparse")
_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in (*_GETTERS, "is_quantized", "is_nested", "is_mps", "is_xpu", "itemsize")
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.__len__, Tensor.get_device),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.is_contiguous, Tensor.ndimension),
    *(torch.is_floating_point, torch.is_complex, torch.numel, Tensor.requires_grad_, Tensor.is_inference),
}
