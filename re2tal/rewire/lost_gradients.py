"""Refuses tensors to which a reversible run gives no gradient: arguments of blocks, and parts of a flat parameter."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from re2tal.rewire.pending import BlockCall, RewireError


def refuse_lost_gradients(block: nn.Module, call: BlockCall, name: str) -> None:
    """Raises ValueError where an argument of the block wants a gradient, weights are cached, or FSDP1 holds them.

    FSDP1 puts views of one flat parameter in the place of a module's own while that is called. The block then has no
    parameters that could be trained, or they are gone when backward runs it again.
    """
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((call.args, call.kwargs))):
        raise ValueError(
            "a rewired stage was called with a further argument that wants a gradient, which a reversible run cannot "
            "give; compute it inside the block from the block's own parameters, detach it, or set recompute=False"
        )
    if parametrize._cache_enabled:
        raise RewireError(
            "a rewired stage is trained inside torch.nn.utils.parametrize.cached(), which keeps weights that its "
            "forward computes without a graph, so that their parameters would get no gradients; leave cached() out"
        )
    held = (one for module in block.modules() for one in (*module._parameters.values(), *vars(module).values()))
    if any(isinstance(one, Tensor) and _is_flat(one) for one in held):
        raise RewireError(
            f"the parameters of block {name} are parts of a flat parameter of FullyShardedDataParallel, from which a "
            "rewired stage gets no gradients; use torch.distributed.fsdp.fully_shard on the stage or the whole model, "
            "or rewire with recompute=False"
        )


def _is_flat(one: Tensor) -> bool:
    return hasattr(one, "_fsdp_flattened") or hasattr(one._base, "_is_flat_param")
