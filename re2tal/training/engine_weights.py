"""The weights of an engine, whichever way ZeRO has sharded them: reached, published to the model, gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from re2tal.training.deepspeed_import import Engine, deepspeed, safe_get_full_fp32_param


def zero_stage(engine: Engine) -> int:
    """0, 1, 2 or 3."""
    return int(engine.zero_optimization_stage())


def master_weights(engine: Engine) -> list[Tensor]:
    """This rank's float32 weights as the optimizer holds them: flat shards under ZeRO, else the parameters themselves.

    Their order and sizes stay the same throughout a run. Writing to them changes the model only after `publish`.
    """
    return [parameter.data for parameter in optimized_parameters(engine)]


def optimized_parameters(engine: Engine) -> list[nn.Parameter]:
    """The parameters of `master_weights`, by which torch's optimizer keeps its state."""
    optimizer = engine.optimizer
    if zero_stage(engine) == 0:
        return [weight for weight in engine.module.parameters() if weight.requires_grad]
    if zero_stage(engine) == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    # DeepSpeed may give stage 1 under bf16 an optimizer class of its own, whose shards have another name.
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return list(optimizer.single_partition_of_fp32_groups)
    return list(optimizer.fp32_groups_flat_partition)


def replicated_weights(engine: Engine) -> dict[str, Tensor]:
    """The parameters, by name, of which every rank holds a whole copy between two steps."""
    return {
        name: weight.data
        for name, weight in engine.module.named_parameters()
        # ZeRO-3 leaves small parameters whole between steps; of those it cuts, `numel` is not `ds_numel`.
        if not hasattr(weight, "ds_id") or (weight.ds_persist and weight.numel() == weight.ds_numel)
    }


@torch.no_grad()
def publish(engine: Engine) -> None:
    """Every rank calls this: makes the model compute with what `master_weights` holds now."""
    optimizer = engine.optimizer
    if zero_stage(engine) == 3:
        # Small parameters stay whole between steps: they are let go, and gathered again with their new values.
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif zero_stage(engine) > 0:
        # Stages 1 and 2: from the float32 shards to the weights of forward, then gathered.
        optimizer.update_lp_params()


@torch.no_grad()
def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """Every rank calls this; rank 0 gets all float32 weights and buffers by name, on the CPU, the others nothing."""
    is_main = dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    saved = set(engine.module.state_dict(keep_vars=True))  # leaves out buffers that are not persistent
    for name, parameter in engine.module.named_parameters():
        with whole(parameter):  # one at a time: the whole model need not fit on a device
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            # The float32 master where there is one: exported weights lose nothing to bf16.
            value = parameter if master is None else master
            if is_main:
                weights[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    for name, buffer in engine.module.named_buffers():
        if is_main and name in saved:
            weights[name] = buffer.detach().to("cpu", copy=True).contiguous()
    return weights


@contextmanager
def whole(*parameters: nn.Parameter) -> Iterator[None]:
    """Every rank enters this: inside, parameters that ZeRO-3 has sharded are whole, to be read."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield
