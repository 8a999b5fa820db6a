"""A checkpoint of another number of ranks, or another ZeRO stage, made to fit this run.

    shards of all its ranks -> whole tensors by parameter: weights, Adam's moments, the average -> this rank's shards
    frozen weights too: the file that the run started from may have changed since

Buffers belong to a rank, not to the run: every rank gets their mean. A run without such buffers goes on as if nothing
had changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from re2tal.training.deepspeed_import import Engine
from re2tal.training.ema import WeightAverage
from re2tal.training.engine_weights import master_weights, optimized_parameters, publish, zero_stage
from re2tal.training.saved_state import Kind, Read, SavedState


def resharded(checkpoint: Path, engine: Engine, average: WeightAverage | None, *, read: Read) -> None:
    """Every rank calls this: fills the engine and the average from a checkpoint of another shape.

    `read`: loads a file without executing anything. ValueError where the checkpoint cannot be taken apart.
    """
    saved = SavedState(checkpoint, read, trained=_trained(engine), grouped=_grouped(engine))
    with torch.no_grad():
        _fill(engine, average, saved)
        _advance(engine, saved)
    for name, buffer in engine.module.named_buffers():
        # Statistics of norms differ by rank: each saw other clips.
        # float64, so that the mean of equal values is that value.
        values = [state["buffers"][name].double() for state in saved.ranks]
        mean = torch.stack(values).mean(dim=0)
        # Integers are counts, such as num_batches_tracked.
        buffer.copy_(mean if buffer.is_floating_point() else mean.round())


def _fill(engine: Engine, average: WeightAverage | None, saved: SavedState) -> None:
    """Weights, moments and average of this rank's shards; without ZeRO, the parameters are the shards."""
    shards = master_weights(engine)
    parameters = dict(engine.module.named_parameters())
    for kind in get_args(Kind):
        if (kind == "average" and average is None) or (whole := saved.whole(kind)) is None:
            continue
        # Zeros, as shards are padded to one length with them.
        flats = [shard.new_zeros(shard.numel()) for shard in shards]
        for name, values in whole.items():
            for place, start, piece in _places(engine, name, parameters[name], values):
                flats[place][start : start + piece.numel()] = piece.to(flats[place])
        targets = [flat.view(shard.shape) for flat, shard in zip(flats, shards, strict=True)]
        if kind == "average":
            assert average is not None
            average.restore(targets)
        elif kind == "weights":
            torch._foreach_copy_(shards, targets)
        else:
            for weight, target in zip(optimized_parameters(engine), targets, strict=True):
                engine.basic_optimizer.state[weight][kind] = target
    _fill_frozen(engine, saved)
    publish(engine)


def _trained(engine: Engine) -> list[str]:
    return [name for name, weight in engine.module.named_parameters() if weight.requires_grad]


def _grouped(engine: Engine) -> list[str]:
    if zero_stage(engine) > 0:
        return [name for group in engine._get_zero_param_shapes() for name in group]
    names = {weight: name for name, weight in engine.module.named_parameters()}
    return [names[weight] for group in engine.optimizer.param_groups for weight in group["params"]]


def _fill_frozen(engine: Engine, saved: SavedState) -> None:
    frozen = {name: one for name, one in engine.module.named_parameters() if not one.requires_grad}
    for name, values in saved.frozen(frozen).items():
        weight, shard = frozen[name], getattr(frozen[name], "ds_tensor", None)
        if values.numel() != (weight.numel() if shard is None else weight.ds_numel):
            raise ValueError(f"{saved.checkpoint} has {values.numel()} numbers of {name}, here it has another shape")
        if shard is None:
            weight.copy_(values.view_as(weight))
        else:
            own = values[engine.global_rank * shard.ds_numel :][: shard.ds_numel]
            shard[: own.numel()] = own.to(shard)


def _places(engine: Engine, name: str, weight: nn.Parameter, values: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Where a parameter lies in this rank's shards: number of the shard, start, and what belongs there."""
    if zero_stage(engine) == 0:
        yield _trained(engine).index(name), 0, values
    elif zero_stage(engine) == 3:
        group, start, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(weight)]
        first = engine.global_rank * length
        yield group, start, values[first : first + length]
    # None: nothing of this parameter is in this rank's part of the row.
    elif (here := weight._hp_mapping) is not None:  # type: ignore[attr-defined]
        part, place = here.lp_fragment_address, here.hp_fragment_address
        yield here.param_group_index, place.start, values[part.start : part.start + part.numel]


def _advance(engine: Engine, saved: SavedState) -> None:
    """Counters, learning rates and loss scale, which are the same on all ranks."""
    states = saved.base(0)["state"]
    if states:
        step = next(iter(states.values()))["step"]
        for weight in optimized_parameters(engine):
            engine.basic_optimizer.state[weight]["step"] = step.clone()
    engine.lr_scheduler.load_state_dict(saved.model["lr_scheduler"])
    # Loading a schedule sets no rate in the optimizer.
    for group, rate in zip(engine.optimizer.param_groups, saved.model["lr_scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    engine.global_steps = saved.model["global_steps"]
    engine.global_samples = saved.model["global_samples"]
    engine.skipped_steps = saved.model["skipped_steps"]
    # DeepSpeed steps where these are a multiple of the accumulation, which may be another one now.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if engine.fp16_enabled():
        engine.optimizer.loss_scaler = saved.optimizers[0]["loss_scaler"]
