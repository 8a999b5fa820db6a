"""DistributedDataParallel reduces the gradient of a parameter when its first part is there, unless its graph is static.

Inside a backward that is nested in another it cannot see that more parts follow. Once all of its parameters have a
part, it takes the step for done, and adds later parts on each rank alone. Then ranks drift apart without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

REMEDY = (
    "DistributedDataParallel took a parameter of a reversible run for ready before its gradient was: it sees no way "
    "from the output to parameters inside a run, nor that two branches, or two calls of a stage, share one; give it "
    "static_graph=True, or, where none is shared, leave find_unused_parameters out"
)

_differentiated = WeakTensorKeyDictionary()
"""Parameter -> the backward in which it last got a part of its gradient."""


def takes_first_parts() -> bool:
    """Whether such a module is in its forward, and its backward will reduce gradients."""
    module = DistributedDataParallel._get_active_ddp_module()
    return module is not None and module.require_backward_grad_sync and not module.static_graph


@contextmanager
def one_part_each(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, RuntimeError where one of `parameters` gets a second part of its gradient in one backward."""
    backward = torch._C._current_graph_task_id()

    def count(parameter: Tensor) -> None:
        if _differentiated.get(parameter) == backward:
            raise RuntimeError(REMEDY)
        _differentiated[parameter] = backward

    with ExitStack() as stack:
        for parameter in parameters:
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(count).remove)
        yield
