"""The place of this process among those of a run, and their collectives.

    deepspeed | torchrun | srun | plain python  --resolve_world-->  World  --export-->  RANK, WORLD_SIZE, LOCAL_RANK,
                                                                                        MASTER_ADDR, MASTER_PORT

`resolve_world` only reads a mapping, so every launcher is one row of a test's table. The collectives below are no-ops
in a process that joined no group, which is how `re2tal detect` runs on one machine.

The gather and the barrier are torch's own. accelerate's would be wrong here: on CPU its `PartialState` reports one
process on every rank of a gloo group that `deepspeed` or torchrun started, so its gather returns each rank its own
value. Only transformers' `HfDeepSpeedConfig`, for models that are born sharded under ZeRO-3, would need accelerate;
nothing here calls that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

MOST_SHOWN = 5
"""Differences between ranks that a message spells out."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of one run, seen from one of them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """This process's number on its own machine."""
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    device_index: int = 0
    """Which of the accelerators this process can see is its own: `local_rank`, or 0 where it sees only one."""

    @property
    def is_main(self) -> bool:
        """True on the process that writes and logs."""
        return self.rank == 0

    def variables(self) -> dict[str, str]:
        """The five variables torch and DeepSpeed read.

        LOCAL_RANK is the device to take, which is what they use it for.
        """
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.device_index),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }

    def export(self) -> None:
        """Puts `variables` into this process's environment, for torch and DeepSpeed."""
        os.environ.update(self.variables())


def resolve_world(environ: Mapping[str, str]) -> World:
    """The world this process was launched into, from its environment variables.

    torchrun and `deepspeed` set RANK and its four companions; srun (and `deepspeed --launcher slurm`) sets SLURM_PROCID
    and its own; with neither this is a world of one process on a free port. Raises ValueError for a partial or
    impossible set.
    """
    if "ACCELERATE_MIXED_PRECISION" in environ:
        _check_accelerate(environ)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_launcher(environ)
    # A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS too, but only what srun started belongs to a step.
    if "SLURM_PROCID" in environ and ("SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ):
        return _from_srun(environ)
    return World(master_port=free_port())


def _check_accelerate(environ: Mapping[str, str]) -> None:
    """Refuses `accelerate launch` where it says nothing of the ranks, or has settings that nobody here reads."""
    if "RANK" not in environ:
        raise ValueError(
            "`accelerate launch` started this process and told it no rank, as it does on a CPU whatever "
            "--num_processes says; it would train alone. Use `deepspeed --num_accelerators N`, "
            "`torchrun --nproc-per-node N` or, for one process, plain python"
        )
    given = {
        name: environ[name]
        for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
        if environ.get(name, "no").lower() not in ("no", "false", "0", "")
    }
    if given:
        raise ValueError(
            f"`accelerate launch` set {given}, which would be ignored: the type of the weights is --engine.precision, "
            "ZeRO is --ds. Start with --mixed_precision no and without --use_deepspeed or --use_fsdp, or use "
            "`deepspeed` or `torchrun`"
        )


def _from_launcher(environ: Mapping[str, str]) -> World:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environ]
    if missing:
        present = {name: environ[name] for name in names if name in environ}
        raise ValueError(
            f"the environment has {present} but not {missing}; start with `deepspeed`, `torchrun` or `srun`, which set "
            "all five, or unset them to run one process"
        )
    local_rank = _integer(environ, "LOCAL_RANK")
    return _checked(
        World(
            rank=_integer(environ, "RANK"),
            world_size=_integer(environ, "WORLD_SIZE"),
            local_rank=local_rank,
            master_addr=environ["MASTER_ADDR"],
            master_port=_integer(environ, "MASTER_PORT"),
            device_index=_device_index(environ, local_rank),
        ),
        source="RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT",
    )


def _from_srun(environ: Mapping[str, str]) -> World:
    tasks = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if name in environ), None)
    nodes = next(
        (name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if name in environ), None
    )
    missing = [
        names
        for names, found in (
            ("SLURM_NTASKS", tasks),
            ("SLURM_JOB_NODELIST", nodes),
            ("SLURM_LOCALID", environ.get("SLURM_LOCALID")),
        )
        if found is None
    ]
    if tasks is None or nodes is None or missing:
        raise ValueError(f"SLURM_PROCID is set but not {missing}; start the ranks with `srun python launch/train.py`")
    local_rank = _integer(environ, "SLURM_LOCALID")
    port = _integer(environ, "MASTER_PORT") if "MASTER_PORT" in environ else _job_port(environ)
    return _checked(
        World(
            rank=_integer(environ, "SLURM_PROCID"),
            world_size=_integer(environ, tasks),
            local_rank=local_rank,
            master_addr=environ.get("MASTER_ADDR") or first_host(environ[nodes]),
            master_port=port,
            device_index=_device_index(environ, local_rank),
        ),
        source=f"SLURM_PROCID, {tasks}, SLURM_LOCALID, MASTER_PORT",
    )


def _job_port(environ: Mapping[str, str]) -> int:
    """A port all tasks of a job agree on and two jobs on one node seldom share."""
    return 10_000 + _integer(environ, "SLURM_JOB_ID") % 50_000 if "SLURM_JOB_ID" in environ else 29_500


def _device_index(environ: Mapping[str, str], local_rank: int) -> int:
    """`--gpus-per-task=1` shows each task one device, which is then number 0 for every task."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    one_device = visible != "" and "," not in visible
    return 0 if one_device else local_rank


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"environment variable {name} is {environ[name]!r}; it must be an integer") from None


def _checked(world: World, *, source: str) -> World:
    if not (
        0 <= world.rank < world.world_size and 0 <= world.local_rank <= world.rank and 0 < world.master_port < 65_536
    ):
        raise ValueError(f"{source} give the impossible {world}; check what set them")
    return world


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compact list, where rank 0 runs: "gpu[08-10,12],login" -> gpu08."""
    part = r"(?:[A-Za-z0-9._-]|\[[0-9,-]+\])+"
    if (first := re.fullmatch(rf"({part})(?:,{part})*", nodelist)) is None:
        raise ValueError(
            f"SLURM node list {nodelist!r} is not of the form gpu[01-04,7],login; set MASTER_ADDR yourself"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[1])


def free_port() -> int:
    """A TCP port nobody listens on now. Raises ConnectionError when this machine has none left."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConnectionError(
            f"no free TCP port on 127.0.0.1 ({error}); close other jobs on this machine, or set MASTER_PORT"
        ) from error


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


def together(make: Callable[[], Value]) -> list[Value]:
    """Every rank calls this: each gets the list of what `make`, which holds no collective, returned on all, by rank.

    An error on one rank is an error on all, so that none waits for the others: its own where it happened, elsewhere a
    ValueError if it was one (what a user gave was wrong), and a RuntimeError if not.
    """
    made: list[Value] = []
    failure: Exception | None = None
    try:
        made.append(make())
    except Exception as error:
        failure = error
        traceback.clear_frames(error.__traceback__)  # which may hold the very memory that ran out
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    answers = gather_objects((made, text, isinstance(failure, ValueError)))
    if failure is not None:
        raise failure
    for rank, (_, text, is_input) in enumerate(answers):
        if text is not None and is_input:
            raise ValueError(text.removeprefix("ValueError: "))
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
