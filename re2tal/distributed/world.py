"""The place of this process among those of a run.

    deepspeed | torchrun | srun | plain python  --resolve_world-->  World  --export-->  RANK, WORLD_SIZE, LOCAL_RANK,
                                                                                        MASTER_ADDR, MASTER_PORT

`resolve_world` only reads a mapping, so every launcher is one row of a test's table.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where Open MPI, MVAPICH, and others with MPICH's process manager say how many processes mpirun started."""

VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""What tells a process which devices of NVIDIA, AMD (two) and Intel it sees."""


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
    _refuse_mpirun(environ)
    # A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS too, but only what srun started belongs to a step.
    if "SLURM_PROCID" in environ and ("SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ):
        return _from_srun(environ)
    return World(master_port=free_port())


def _refuse_mpirun(environ: Mapping[str, str]) -> None:
    """What mpirun starts would train alone, or, inside a job of SLURM, take the places of mpirun's own helpers."""
    # A step of srun may have PMI_SIZE too.
    names = MPI_SIZES if "SLURM_PROCID" not in environ else MPI_SIZES[:-1]
    if (name := _first_of(environ, *names)) and environ[name] != "1":
        raise ValueError(
            f"mpirun started this process as one of {environ[name]} ({name}), and nothing told it RANK and where the "
            "others are: each would run alone. Use `deepspeed` (without --launcher), `torchrun` "
            "or `srun`, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process"
        )


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
    rank, world_size, local_rank, _, port = names
    return _checked(environ, rank, world_size, local_rank, port, address=environ["MASTER_ADDR"])


def _from_srun(environ: Mapping[str, str]) -> World:
    tasks = _first_of(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    nodes = _first_of(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    wanted = {"SLURM_NTASKS": tasks, "SLURM_JOB_NODELIST": nodes, "SLURM_LOCALID": "SLURM_LOCALID" in environ}
    if missing := [name for name, found in wanted.items() if not found]:
        raise ValueError(f"SLURM_PROCID is set but not {missing}; start the ranks with `srun python launch/train.py`")
    if "MASTER_PORT" not in environ:
        environ = {**environ, "MASTER_PORT": str(_job_port(environ))}
    address = environ.get("MASTER_ADDR") or first_host(environ[nodes])
    return _checked(environ, "SLURM_PROCID", tasks, "SLURM_LOCALID", "MASTER_PORT", address=address)


def _first_of(environ: Mapping[str, str], *names: str) -> str:
    """The first of the names that is set; "" where none is."""
    return next((name for name in names if name in environ), "")


def _job_port(environ: Mapping[str, str]) -> int:
    """A port all tasks of a step agree on, and two steps or jobs on one node seldom share."""
    if "SLURM_JOB_ID" not in environ:
        return 29_500
    step = _first_of(environ, "SLURM_STEP_ID", "SLURM_STEPID")
    # A prime, so that a step of one job seldom meets the first step of the next one.
    return 10_000 + (_integer(environ, "SLURM_JOB_ID") + 7_919 * _integer(environ, step)) % 50_000


def _device_index(environ: Mapping[str, str], local_rank: int) -> int:
    """`--gpus-per-task=1` shows each task one device, which is then number 0 for every task."""
    shown = [environ[name] for name in VISIBLE_DEVICES if environ.get(name)]
    # All, as a variable of another vendor's devices may be left from elsewhere.
    return 0 if shown and all("," not in devices for devices in shown) else local_rank


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"environment variable {name} is {environ[name]!r}; it must be an integer") from None


def _checked(
    environ: Mapping[str, str], rank: str, world_size: str, local_rank: str, port: str, *, address: str
) -> World:
    """The world of the four variables of these names; ValueError where their values are impossible."""
    number = partial(_integer, environ)
    world = World(
        rank=number(rank),
        world_size=number(world_size),
        local_rank=number(local_rank),
        master_addr=address,
        master_port=number(port),
        device_index=_device_index(environ, number(local_rank)),
    )
    if not (
        0 <= world.rank < world.world_size and 0 <= world.local_rank <= world.rank and 0 < world.master_port < 65_536
    ):
        raise ValueError(f"{rank}, {world_size}, {local_rank}, {port} give the impossible {world}; check what set them")
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
