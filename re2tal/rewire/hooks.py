"""Hooks on the blocks of a rewired stage: users' fire once a forward, those of DeepSpeed and FSDP with every branch.

A stage runs the branches of a block, and not the block. Hooks that a user, or a library that collects hidden states,
has put on a block, or on all modules (`register_module_forward_hook`), therefore fire when the parent calls its handle.
Hooks that gather and release parameters belong to the calls in which these are used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from re2tal.reversible.attributes import module_of
from re2tal.rewire.pending import RewireError

_GATHERING = ("deepspeed.", "torch.distributed.", "torch.utils.module_tracker")  # the last only notes who is called
_Place = tuple[Any, str]
"""Of hooks: what holds them, and as which attribute."""
FOR_ALL: tuple[_Place, ...] = (all_modules, "_global_forward_hooks"), (all_modules, "_global_forward_pre_hooks")


class CalledPast:
    """A hook that finds calls of a block that do not come from its stage."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, block: nn.Module, args: tuple) -> None:
        """Raises RewireError unless a stage is calling."""
        # `called_with` sets a forward on the instance while a stage calls the block.
        if "forward" not in vars(block):
            raise RewireError(
                f"block {self.name} was called past its rewired stage, by which it would not be coupled to the others: "
                "iterate over the container of the blocks or index it, instead of children() or attributes, or unrewire"
            )


def guard(block: nn.Module, name: str) -> None:
    """Makes calls of `block` past its stage an error."""
    if not any(isinstance(hook, CalledPast) for hook in block._forward_pre_hooks.values()):
        block.register_forward_pre_hook(CalledPast(name))


def unguard(block: nn.Module) -> None:
    """Undoes `guard`."""
    for key, hook in list(block._forward_pre_hooks.items()):
        if isinstance(hook, CalledPast):
            del block._forward_pre_hooks[key]


def forward_hooks_of(block: nn.Module) -> tuple[_Place, ...]:
    """Where the forward hooks are that fire when `block` is called."""
    return (block, "_forward_hooks"), (block, "_forward_pre_hooks"), *FOR_ALL


def has_hooks(block: nn.Module) -> bool:
    """Whether a user has put hooks on `block`, or on all modules, or a forward of its own on the instance."""
    return "forward" in vars(block) or _of_users_at(forward_hooks_of(block)) or _has_backward_hooks(block)


def _has_backward_hooks(block: nn.Module) -> bool:
    own, of_all = (block._backward_hooks, block._backward_pre_hooks), all_modules
    return any(map(of_users, (*own, of_all._global_backward_hooks, of_all._global_backward_pre_hooks)))


def _of_users_at(places: Iterable[_Place]) -> bool:
    return any(of_users(getattr(owner, name)) for owner, name in places)


def hooked_inside(blocks: Iterable[nn.Module]) -> bool:
    """Whether a user has put forward hooks on modules inside of `blocks`, which may collect what they return."""
    inside = (module for block in blocks for module in block.modules() if module is not block)
    return _of_users_at(FOR_ALL) or any(
        of_users(module._forward_hooks) or of_users(module._forward_pre_hooks) for module in inside
    )


def check_hooks(block: nn.Module, name: str) -> None:
    """Raises RewireError for what cannot fire."""
    if "forward" in vars(block):
        raise RewireError(
            f"the forward of block {name} was replaced on the instance, and a rewired stage would not call it; put the "
            "change into a class of its own, or replace it before rewiring, which then leaves the block alone"
        )
    if _has_backward_hooks(block):
        raise RewireError(
            f"block {name} has a backward hook, but is differentiated branch by branch; put the hook on a module "
            "inside it, or on a parameter; one for all modules (register_module_full_backward_hook) would leave the "
            "blocks out"
        )


def check_kind(block: nn.Module, kind: type[nn.Module], name: str) -> None:
    """Raises RewireError where `block` is not of the `kind` that its branches were found for.

    FSDP gives a block another class, which has the same forward.
    """
    if not isinstance(block, kind) or type(block).forward is not kind.forward:
        raise RewireError(
            f"block {name} is a {type(block).__name__}, and was a {kind.__name__} when its branches were found; "
            "unrewire the model, change it, and rewire it once more"
        )


def called_with(
    block: nn.Module,
    forward: Callable[..., Any],
    x: Tensor,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    hidden: Sequence[_Place] = (),
) -> Any:
    """Calls `block` as a module, for its hooks, with another forward for this one call.

    Of the hooks at `hidden` only those that gather parameters fire for this call; for modules called inside all do.
    """
    if _of_users_at(hidden):
        # The dicts are exchanged, not emptied: a handle that removes its hook inside finds it in the one it knows.
        every = [getattr(owner, name) for owner, name in hidden]
        gathering = [OrderedDict((key, hook) for key, hook in hooks.items() if _gathers(hook)) for hooks in every]

        def with_hooks(*args: Any, **kwargs: Any) -> Any:
            with _exchanged(hidden, every):
                return forward(*args, **kwargs)

        with _exchanged(hidden, gathering):
            return called_with(block, with_hooks, x, args, kwargs)
    usual = vars(block).get("forward")
    block.forward = forward
    try:
        return block(x, *args, **kwargs)
    finally:
        del block.forward
        if usual is not None:
            block.forward = usual


@contextmanager
def _exchanged(places: Sequence[_Place], hooks: Sequence[Mapping[int, Callable]]) -> Iterator[None]:
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), ours in zip(places, hooks, strict=True):
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for (owner, name), was in zip(places, before, strict=True):
            setattr(owner, name, was)


def is_sharded(block: nn.Module) -> bool:
    """Whether FSDP gathers all parameters in `block` when it is called."""
    return any(module_of(hook).startswith("torch.distributed.fsdp") for hook in block._forward_pre_hooks.values())


def of_users(hooks: Mapping[int, Callable]) -> bool:
    """Whether any of them was put there by a user, not by what gathers parameters or by `guard`."""
    return any(not (_gathers(hook) or isinstance(hook, CalledPast)) for hook in hooks.values())


def _gathers(hook: Any) -> bool:
    return module_of(hook).startswith(_GATHERING)
