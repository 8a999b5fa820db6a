"""Who takes the first part of a parameter's gradient for all of it, where two branches, or two calls, share it.

DistributedDataParallel reduces a gradient when its first part is there, unless its graph is static. Inside a backward
that is nested in another it cannot see that more parts follow. Once all of its parameters have a part, it takes the
step for done, and adds later parts on each rank alone. Then ranks drift apart without an error.

A hook that somebody has put on a parameter fires once in plain autograd, with the sum of all parts. An optimizer that
steps in such hooks would change a weight between two branches that share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from re2tal.reversible.attributes import module_of

REMEDY = (
    "DistributedDataParallel took a parameter of a reversible run for ready before its gradient was: it sees no way "
    "from the output to parameters inside a run, nor that two branches, or two calls of a stage, share one; give it "
    "static_graph=True, or, where none is shared, leave find_unused_parameters out"
)

_OF_HOOKS = (
    "a parameter with a hook is shared by two branches of reversible runs, or by two calls of a stage: its gradient "
    "comes in two parts, and the hook would fire for each, not once for their sum; take the hook off (of an optimizer "
    "that steps in hooks, too), give each branch a parameter of its own, or run with recompute=False"
)

_differentiated = WeakTensorKeyDictionary()
"""Parameter -> the backward in which it last got a part of its gradient."""


def takes_first_parts() -> bool:
    """Whether such a module is in its forward, and its backward will reduce gradients."""
    module = DistributedDataParallel._get_active_ddp_module()
    return module is not None and module.require_backward_grad_sync and not module.static_graph


@contextmanager
def one_part_each(parameters: Iterable[Tensor], *, only_hooked: bool) -> Iterator[None]:
    """Inside, RuntimeError where one of `parameters` gets a second part of its gradient in one backward.

    `only_hooked`: one on which a user has put a hook.
    """
    backward, remedy = torch._C._current_graph_task_id(), _OF_HOOKS if only_hooked else REMEDY

    def count(parameter: Tensor) -> None:
        if _differentiated.get(parameter) == backward:
            raise RuntimeError(remedy)
        _differentiated[parameter] = backward

    with ExitStack() as stack:
        for parameter in parameters:
            if parameter.requires_grad and (not only_hooked or _has_hooks(parameter)):
                stack.callback(parameter.register_post_accumulate_grad_hook(count).remove)
        yield


def _has_hooks(parameter: Tensor) -> bool:
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooks = [hook for kind in kinds for hook in (getattr(parameter, kind) or {}).values()]
    # A function of torch counts: a user made it a hook. Optimizers of `torch.distributed.optim` hook the node
    # that accumulates, which shows nothing, but mark the parameter.
    by_users = any(not module_of(hook).startswith(("deepspeed.", "re2tal.")) for hook in hooks)
    return by_users or hasattr(parameter, "_in_backward_optimizers")
