"""Collectives of the ranks of a run; without a group they do nothing, which is how `re2tal detect` runs on one machine.

The gather and the barrier are torch's own. accelerate's would be wrong here: on CPU its `PartialState` reports one
process on every rank of a gloo group that `deepspeed` or torchrun started, so its gather returns each rank its own
value. Only transformers' `HfDeepSpeedConfig`, for models that are born sharded under ZeRO-3, would need accelerate;
nothing here calls that.
"""

from __future__ import annotations

import hashlib
import json
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

MOST_SHOWN = 5
"""Differences between ranks that a message spells out."""


def is_main() -> bool:
    """True on the process that writes and logs: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather_objects(value: Value) -> list[Value]:
    """Every rank calls this; each gets the list of all ranks' values, by rank.

    Values travel pickled between the ranks of one run, which trust each other.
    """
    if not _joined():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def exchange_objects(parts: Sequence[Value]) -> list[Value]:
    """Every rank calls this with one value for each rank; each gets those that are for it, by the rank they are from.

    A rank holds what it gives and what it gets, where `gather_objects` gives all of it to all.
    """
    if not _joined():
        return list(parts)
    received: list = [None] * dist.get_world_size()
    for rank, part in enumerate(parts):
        dist.gather_object(part, received if rank == dist.get_rank() else None, dst=rank)
    return received


def together(make: Callable[[], Value]) -> list[Value]:
    """Every rank calls this: each gets the list of what `make`, which holds no collective, returned on all, by rank.

    An error on one rank is an error on all, so that none waits for the others: its own where it happened, elsewhere a
    ValueError or OSError if it was one (a fault in what was given, or in the machine), and a RuntimeError if not.
    """
    made: list[Value] = []
    failure: Exception | None = None
    try:
        made.append(make())
    except Exception as error:
        failure = error
        traceback.clear_frames(error.__traceback__)  # which may hold the very memory that ran out
    kind = next((kind for kind in (ValueError, OSError) if isinstance(failure, kind)), None)
    text = None if failure is None else str(failure) if kind else f"{type(failure).__name__}: {failure}"
    answers = gather_objects((made, text, kind))
    if failure is not None:
        raise failure
    for rank, (_, text, kind) in enumerate(answers):
        if text is not None and kind is not None:
            raise kind(text)
        if text is not None:
            raise RuntimeError(f"rank {rank} failed, and all ranks end with it: {text}")
    return [value for (value,), _, _ in answers]


def named_host() -> str:
    """The name of this machine, for messages."""
    return socket.gethostname()


def refuse_differences(facts: Mapping[str, object]) -> None:
    """Every rank calls this with JSON values by name. ValueError on all ranks if a value differs, or has no equal.

    It names each key, with its values and one rank and host of each.
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    if len(set(gather_objects(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    answers = gather_objects((named_host(), json.loads(text)))
    differences = []
    for key in dict.fromkeys(key for _, of_rank in answers for key in of_rank):
        holders: dict[str, list[str]] = {}
        for rank, (host, of_rank) in enumerate(answers):
            value = json.dumps(of_rank[key]) if key in of_rank else "missing"
            holders.setdefault(value, []).append(f"rank {rank} (host {host})")
        if len(holders) > 1:
            shown = (
                f"{value} on {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")
                for value, ranks in holders.items()
            )
            differences.append(f"{key}: {', '.join(shown)}")
    more = f"; and {len(differences) - MOST_SHOWN} more" if len(differences) > MOST_SHOWN else ""
    raise ValueError(
        f"the ranks of this run differ in {'; '.join(differences[:MOST_SHOWN])}{more}. Start all of them from the same "
        "code with the same options, files and data"
    )


def made_by_main(make: Callable[[], Value]) -> Value:
    """Every rank calls this: all get what rank 0 makes, or end with its error."""
    (value,) = together(lambda: [make()] if is_main() else [])[0]
    return value


def any_rank(flag: bool | torch.Tensor, *, device: torch.device | str = "cpu") -> bool:
    """Every rank calls this; True on all of them when `flag` is True on one. `device`: where the group communicates.

    A tensor of one element stays where it is until all ranks have voted: the host waits once, for the result.
    """
    if not _joined():
        return bool(flag)
    votes = torch.as_tensor(flag, dtype=torch.int32, device=device).reshape(1)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Every rank calls this with a float tensor of the same shape, on the device where the group communicates."""
    if not _joined():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def value_of_each_rank(value: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Every rank calls this with a scalar on the device where the group communicates; each gets all of them (R,) and
    its own number. No host waits."""
    if not _joined():
        return value.reshape(1), 0
    values = value.new_zeros(dist.get_world_size())
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    return values, dist.get_rank()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Every rank enters this; rank 0 runs the body first, the others when it is done, or has failed."""
    if _joined() and dist.get_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if _joined() and dist.get_rank() == 0:
            dist.barrier()


def _joined() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
