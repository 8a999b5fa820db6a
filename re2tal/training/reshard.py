"""A checkpoint of another number of ranks, or another ZeRO stage, made to fit this run.

    shards of all its ranks -> whole tensors by parameter: weights, Adam's moments, the average -> this rank's shards
    frozen weights too: the file that the run started from may have changed since

Buffers belong to a rank, not to the run: every rank gets their mean. A run without such buffers goes on as if nothing
had changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from re2tal.training.deepspeed_import import Engine
from re2tal.training.ema import WeightAverage
from re2tal.training.engine_weights import master_weights, optimized_parameters, publish, zero_stage

Kind = Literal["weights", "average", "exp_avg", "exp_avg_sq"]
Whole = Mapping[str, Tensor]
"""By the names of the parameters, flattened."""
Read = Callable[[Path], Any]


def resharded(checkpoint: Path, engine: Engine, average: WeightAverage | None, *, read: Read) -> None:
    """Every rank calls this: fills the engine and the average from a checkpoint of another shape.

    `read`: loads a file without executing anything. ValueError where the checkpoint cannot be taken apart.
    """
    saved = _Saved(checkpoint, read, trained=_trained(engine), grouped=_grouped(engine))
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


class _Saved:
    """The files of a checkpoint, read."""

    def __init__(self, checkpoint: Path, read: Read, *, trained: Sequence[str], grouped: Sequence[str]) -> None:
        """`trained`, `grouped`: names of the trained parameters, in the order of the network and in that of the
        optimizer's groups. Files of stage 0 do not hold them."""
        self.checkpoint = checkpoint
        self.trained = trained
        self.grouped = grouped
        self.ranks = [read(path) for path in _by_rank(checkpoint, "rank-*.pt")]
        shards = _by_rank(checkpoint, "*zero_pp_rank_*_optim_states.pt")
        self.optimizers = [read(path)["optimizer_state_dict"] for path in shards]
        models = [read(path) for path in _by_rank(checkpoint, "*model_states.pt")]  # under stage 3 one of each rank
        self.model = models[0]
        self._frozen = [model.get("frozen_param_fragments") or {} for model in models]
        self.stage = int(self.optimizers[0]["zero_stage"]) if self.optimizers else 0
        if self.stage and len(self.optimizers) != len(self.ranks):
            raise ValueError(f"{checkpoint} has {len(self.ranks)} ranks and {len(self.optimizers)} optimizer files")

    def base(self, rank: int) -> dict[str, Any]:
        """The state of torch's optimizer on a rank."""
        if self.stage == 0:
            return self.model["optimizer"]
        return self.optimizers[rank]["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]

    def whole(self, kind: Kind) -> Whole | None:
        """None where the checkpoint holds nothing of this kind: moments before the first step, or no average."""
        if self.stage == 0:
            return self._whole_of_0(kind)
        flats = [self._flats(kind, rank) for rank in range(len(self.ranks))]
        if any(flat is None for flat in flats):
            return None
        parts = self._pieces_of_3(flats) if self.stage == 3 else self._pieces_of_2(flats)
        wholes: dict[str, list[Tensor]] = {}
        for name, piece in parts:
            wholes.setdefault(name, []).append(piece)
        shapes = {name: shape for group in self.model["param_shapes"] for name, shape in group.items()}
        # Cut, because the last piece of stage 3 is padded.
        joined = {name: torch.cat(wholes.get(name, [torch.zeros(0)]))[: math.prod(shapes[name])] for name in shapes}
        for name, values in joined.items():
            if values.numel() != math.prod(shapes[name]):
                raise ValueError(
                    f"{self.checkpoint} holds {values.numel()} of the {math.prod(shapes[name])} numbers of {name} "
                    f"({kind}); resume with as many ranks and the ZeRO stage it was written with"
                )
        return joined

    def _whole_of_0(self, kind: Kind) -> Whole | None:
        """Of the first rank: without ZeRO, each holds all of it."""
        weights = {name: self.model["module"][name] for name in self.trained}
        if kind == "weights":
            values = weights
        elif kind == "average":
            if (shards := self.ranks[0]["average"]) is None:
                return None
            values = dict(zip(self.trained, shards, strict=True))
        else:
            if not (states := self.base(0)["state"]):
                return None
            # A parameter that no loss reaches has no moments, or, under ZeRO, zeros.
            values = {
                name: states[place][kind] if place in states else torch.zeros_like(weights[name])
                for place, name in enumerate(self.grouped)
            }
        return {name: value.flatten() for name, value in values.items()}

    def frozen(self, names: Collection[str]) -> Whole:
        """The parameters of these names, which nothing trains, in the type of the weights."""
        if self.stage != 3:
            held = {name: self.model["module"].get(name) for name in names}
        else:
            held = {name: self._joined(name) for name in names}
        if lacking := sorted(name for name, value in held.items() if value is None):
            raise ValueError(f"{self.checkpoint} does not hold the frozen weights {', '.join(lacking[:3])}")
        return {name: value.flatten() for name, value in held.items() if value is not None}

    def _joined(self, name: str) -> Tensor | None:
        shape = (self.model.get("frozen_param_shapes") or {}).get(name)
        if shape is None:
            return None
        return torch.cat([of_rank[name].flatten() for of_rank in self._frozen])[: math.prod(shape)]

    def _flats(self, kind: Kind, rank: int) -> list[Tensor] | None:
        optimizer = self.optimizers[rank]
        if kind == "average":
            return self.ranks[rank]["average"]
        if kind == "weights":
            # Stage 3 saves the first, stages 1 and 2 the second.
            for key in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
                if key in optimizer:
                    return list(optimizer[key])
            raise ValueError(f"{self.checkpoint} holds no float32 weights of rank {rank}, only {sorted(optimizer)}")
        states = self.base(rank)["state"]
        return [states[group][kind] for group in sorted(states)] or None

    def _pieces_of_3(self, flats: list[Any]) -> Iterator[tuple[str, Tensor]]:
        """Stage 3 cuts every parameter in as many equal pieces as there are ranks, the last one padded."""
        # DeepSpeed keeps the row in subgroups, in the order of the parameters.
        joined = [torch.cat(list(of_rank)) for of_rank in flats]
        start = 0
        for group in self.model["param_shapes"]:
            for name, shape in group.items():
                length = -(-math.prod(shape) // len(joined))
                yield from ((name, of_rank[start : start + length]) for of_rank in joined)
                start += length

    def _pieces_of_2(self, flats: list[Any]) -> Iterator[tuple[str, Tensor]]:
        """Stages 1 and 2 cut the row of all parameters of a group."""
        for rank, of_rank in enumerate(flats):
            for group, places in enumerate(self.optimizers[rank]["param_slice_mappings"]):
                for name, place in places.items():
                    yield name, of_rank[group][place.start : place.start + place.numel]


def _by_rank(checkpoint: Path, pattern: str) -> list[Path]:
    def rank(path: Path) -> int:
        return int(re.findall(r"rank[_-](\d+)", path.name)[0])

    return sorted(checkpoint.glob(pattern), key=rank)


def _fill(engine: Engine, average: WeightAverage | None, saved: _Saved) -> None:
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


def _fill_frozen(engine: Engine, saved: _Saved) -> None:
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


def _advance(engine: Engine, saved: _Saved) -> None:
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
