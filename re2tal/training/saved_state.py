"""The files of a checkpoint, read: whole tensors by parameter, out of the shards of all its ranks.

no ZeRO       each rank holds all of it
stages 1, 2   a group's shards, rank by rank, are its parameters one after the other; padding follows
stage 3       each rank has its equal part of each parameter, the last one padded
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["weights", "average", "exp_avg", "exp_avg_sq"]
Whole = Mapping[str, Tensor]
"""By the names of the parameters, flattened."""
Read = Callable[[Path], Any]


class SavedState:
    """A checkpoint. The optimizer's files, the largest by far, are read only where something of theirs is asked for."""

    def __init__(
        self, checkpoint: Path, read: Read, *, trained: Sequence[str] = (), grouped: Sequence[str] = ()
    ) -> None:
        """`read`: loads a file without executing anything. `trained`, `grouped`: names of the trained parameters, in
        the order of the network and in that of the optimizer's groups. Files of stage 0 do not hold them."""
        self.checkpoint = checkpoint
        self.trained = trained
        self.grouped = grouped
        self._read = read
        ranks, models = _by_rank(checkpoint, "rank-*.pt"), _by_rank(checkpoint, "*model_states.pt")
        self._shards = _by_rank(checkpoint, "*zero_pp_rank_*_optim_states.pt")
        if not (ranks and models):
            raise FileNotFoundError(f"{checkpoint} holds no model")
        if self._shards and len(self._shards) != len(ranks):
            raise ValueError(f"{checkpoint} has {len(ranks)} ranks and {len(self._shards)} optimizer files")
        self.is_sharded = bool(self._shards)
        # Under stage 3 each rank writes its part of the model too.
        self.cuts_parameters = models[0].name.startswith("zero_pp_rank")
        self.ranks = [read(path) for path in ranks]
        self._models = [read(path) for path in models]
        refuse_scrambled(checkpoint, self.model.get("ds_config"), num_ranks=len(ranks))

    @property
    def model(self) -> dict[str, Any]:
        """What the first rank wrote of the model, and of the engine."""
        return self._models[0]

    @cached_property
    def optimizers(self) -> list[dict[str, Any]]:
        """By rank, under ZeRO."""
        return [self._read(path)["optimizer_state_dict"] for path in self._shards]

    @property
    def shapes(self) -> dict[str, Sequence[int]]:
        """Under ZeRO: of the trained parameters, in the order of the shards."""
        return {name: shape for group in self.model["param_shapes"] for name, shape in group.items()}

    @property
    def frozen_shapes(self) -> dict[str, Sequence[int]]:
        """Under stage 3: of the parameters that nothing trains."""
        return self.model.get("frozen_param_shapes") or {}

    def base(self, rank: int) -> dict[str, Any]:
        """The state of torch's optimizer on a rank."""
        if not self.is_sharded:
            return self.model["optimizer"]
        return self.optimizers[rank]["optimizer_state_dict" if self.cuts_parameters else "base_optimizer_state"]

    def whole(self, kind: Kind) -> Whole | None:
        """None where the checkpoint holds nothing of this kind: moments before the first step, or no average."""
        if not self.is_sharded:
            return self._whole_of_0(kind)
        flats = [self._flats(kind, rank) for rank in range(len(self.ranks))]
        if any(flat is None for flat in flats):
            return None
        parts = self._of_parts(flats) if self.cuts_parameters else self._of_rows(flats)
        shapes = self.shapes
        # Cut, because the last piece of stage 3 is padded.
        joined = {name: values[: math.prod(shapes[name])] for name, values in parts}
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
        if not self.cuts_parameters:
            held = {name: self.model["module"].get(name) for name in names}
        else:
            held = {name: self._joined(name) for name in names}
        if lacking := sorted(name for name, value in held.items() if value is None):
            raise ValueError(f"{self.checkpoint} does not hold the frozen weights {', '.join(lacking[:3])}")
        return {name: value.flatten() for name, value in held.items() if value is not None}

    def _joined(self, name: str) -> Tensor | None:
        if (shape := self.frozen_shapes.get(name)) is None:
            return None
        fragments = [model["frozen_param_fragments"][name].flatten() for model in self._models]
        return torch.cat(fragments)[: math.prod(shape)]

    def _flats(self, kind: Kind, rank: int) -> list[Tensor] | None:
        if kind == "average":
            return self.ranks[rank]["average"]
        optimizer = self.optimizers[rank]
        if kind == "weights":
            # Stage 3 saves the first, stages 1 and 2 the second.
            for key in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
                if key in optimizer:
                    return list(optimizer[key])
            raise ValueError(f"{self.checkpoint} holds no float32 weights of rank {rank}, only {sorted(optimizer)}")
        states = self.base(rank)["state"]
        return [states[group][kind] for group in sorted(states)] or None

    def _of_parts(self, flats: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
        """Stage 3."""
        # DeepSpeed keeps the row in subgroups, in the order of the parameters.
        joined = [torch.cat([one.flatten() for one in of_rank]) for of_rank in flats]
        start = 0
        for name, shape in self.shapes.items():
            length = -(-math.prod(shape) // len(joined))
            yield name, torch.cat([of_rank[start : start + length] for of_rank in joined])
            start += length

    def _of_rows(self, flats: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
        """Stages 1 and 2."""
        gaps: Sequence[Sequence[int]] = [[0] * len(group) for group in self.model["param_shapes"]]
        if _zero_settings(self.model.get("ds_config")).get("parameter_alignment"):
            gaps = self.optimizers[0]["param_alignment_paddings"]  # zeros after each parameter
        for number, group in enumerate(self.model["param_shapes"]):
            row = torch.cat([of_rank[number].flatten() for of_rank in flats])
            start = 0
            for (name, shape), gap in zip(group.items(), gaps[number], strict=True):
                yield name, row[start : start + math.prod(shape)]
                start += math.prod(shape) + gap


def refuse_scrambled(checkpoint: Path, settings: Any, *, num_ranks: int) -> None:
    """ValueError where its shards are in an order that nothing puts right again; `settings`: those of DeepSpeed that it
    was written under."""
    zero = _zero_settings(settings)
    if num_ranks > 1 and zero.get("stage") in (1, 2) and zero.get("round_robin_gradients"):
        raise ValueError(
            f"{checkpoint} was written with zero_optimization.round_robin_gradients, as earlier versions allowed: on "
            f"{num_ranks} ranks it has the weights of one parameter in the place of another's; begin a run anew"
        )


def _zero_settings(settings: Any) -> Mapping[str, Any]:
    return settings.get("zero_optimization", {}) if isinstance(settings, dict) else {}


def _by_rank(checkpoint: Path, pattern: str) -> list[Path]:
    # By number: names of more than 9 ranks are not in the order of their text.
    return sorted(checkpoint.glob(pattern), key=lambda path: int(re.findall(r"rank[_-](\d+)", path.name)[0]))
