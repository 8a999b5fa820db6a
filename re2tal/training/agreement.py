"""What must be alike on all ranks of a run, compared before the first step and again on the way.

A rank with another learning rate, another order of the data, other code or one other weight would train to the end
with the rest, and its gradients would spoil theirs without a word.

    checksum of a tensor  =  sum of its bits, read as integers              (wraps; one number per weight)
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import re2tal
from re2tal.distributed import gather_objects, named_host
from re2tal.training.deepspeed_import import Engine
from re2tal.training.engine_weights import replicated_weights

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> how its bits are read."""


def versions() -> dict[str, str]:
    """Of the interpreter, the libraries that compute, and this program's own source."""
    # A copy that was edited on one machine still has the same version number.
    source = hashlib.sha256()
    root = Path(re2tal.__file__).parent
    for path in sorted(root.rglob("*.py")):
        source.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return {
        "version of Python": sys.version.split()[0],
        "version of torch": torch.__version__,
        "version of deepspeed": version("deepspeed"),
        "version of re2tal": f"{re2tal.__version__}, source {source.hexdigest()[:16]}",
    }


@torch.no_grad()
def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """One int64 per tensor, on the device of the first; any single changed bit changes it."""
    # As integers: NaN differs from itself, and -0.0 equals 0.0. A sum of integers wraps and loses no bit to rounding.
    sums = [
        tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors
    ]
    return torch.stack([of_one.to(sums[0].device) for of_one in sums]) if sums else torch.zeros(0, dtype=torch.int64)


def weight_checksums(model: torch.nn.Module) -> dict[str, int]:
    """Of all parameters and buffers by name, before an engine has sharded them."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sums = checksums(tensors.values()).tolist()
    return {f"weights of {name}": value for name, value in zip(tensors, sums, strict=True)}


def refuse_drifted_replicas(engine: Engine, *, step: int) -> None:
    """Every rank calls this between two steps. FloatingPointError on all when weights that each holds whole differ.

    What ZeRO shards has no second copy to compare with: under stage 3 these are all but the small parameters.
    """
    # The same names on all ranks, so that all return here or none does.
    held = replicated_weights(engine)
    if not held or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    sums = checksums(held.values()).to(engine.device)
    # One collective for the largest and the smallest: -max(-x) is the minimum.
    extremes = torch.stack([sums, -sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if bool((extremes[0] == -extremes[1]).all()):
        return
    # Only now, as it is slow: all ranks have seen the same extremes, so all come here.
    answers = gather_objects((named_host(), sums.tolist()))
    differing = [
        (name, [(host, of_rank[place]) for host, of_rank in answers])
        for place, name in enumerate(held)
        if len({of_rank[place] for _, of_rank in answers}) > 1
    ]
    name, values = differing[0]
    [(common, number), *_] = Counter(value for _, value in values).most_common(1)
    by_vote = 2 * number > len(values)  # of two ranks none can be told to be the wrong one
    odd = [f"rank {rank} (host {host})" for rank, (host, value) in enumerate(values) if not by_vote or value != common]
    raise FloatingPointError(
        f"after step {step} the weights of {name} (of {len(differing)} parameters in all) on {', '.join(odd)} differ "
        f"from {'those of the other ranks' if by_vote else 'each other'}: a fault of memory, device or code; nothing "
        "is saved. Check the machine, then resume from the last checkpoint"
    )


def videos_by_rank(videos: Sequence[str]) -> str:
    """Every rank calls this with the videos it blames, if any; which rank, on which host, blames which, in words."""
    answers = enumerate(gather_objects((named_host(), list(videos))))
    blamed = [f"rank {rank} (host {host}) has it from {names}" for rank, (host, names) in answers if names]
    return "; ".join(blamed) or "on no rank alone, but in their sum"
