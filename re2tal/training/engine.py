"""DeepSpeed, and only here: joining the processes, building the engine, reaching its weights, its files on the disk.

`re2tal.training.zero_file` turns a file of ds_configs/ and an EngineConfig into the settings the engine is built with.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from re2tal.distributed import World, any_rank, named_host
from re2tal.options import option
from re2tal.training.rendezvous import refuse_foreign_listener
from re2tal.training.sharding import is_sharded_early, shard

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address

deepspeed_logger.setLevel(logging.WARNING)

TORCH_LINEAR = torch.nn.functional.linear

Engine: TypeAlias = deepspeed.DeepSpeedEngine

WeightType = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[WeightType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

GLOO_THREAD = "pt_gloo_runloop"
"""The name torch gives the threads that do gloo's collectives."""

SWITCHES = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
"""Linux's names for the number of times that a thread was switched out; some sandboxes do not report them."""

SECTIONS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}
"""Section of a DeepSpeed file -> the schema that knows its keys."""


@dataclass(frozen=True)
class EngineConfig:
    """Batch, precision and limits of a step; they fill the "auto" entries of the ZeRO file."""

    batch_size: int = 1
    """Clips per rank in one forward."""
    gradient_accumulation: int = 1
    """Forwards and backwards per optimizer step."""
    gradient_clipping: float = 1.0
    """Largest L2 norm of all gradients together; 0 clips nothing."""
    precision: WeightType = "fp32"
    """Type of the weights in forward and backward; the optimizer keeps float32 masters."""
    memory_budget_gb: float | Literal["auto"] | None = option(None, resumable=True)
    """Gigabytes (10^9 bytes) of a rank's device that a step may need. The planner picks, per stage, the fastest way to
    stay under this: store, recompute, or recompute in chunks. It overrides backbone.recompute, chunk_mebibytes, known,
    keep_nonresidual and offload. "auto" takes most of the device's free memory at the start; on a CPU, of the system's,
    shared by the ranks of a machine. None: no plan."""
    timeout_minutes: float = option(10.0, resumable=True, planned=False)
    """How long a rank waits for the others before it names who is missing and gives up; three times as long where one
    rank may take its time: start-up, the first step, a checkpoint, the export."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name} is {getattr(self, name)}; it must be at least 1")
        if not (self.memory_budget_gb in ("auto", None) or 0 < float(self.memory_budget_gb) < math.inf):
            raise ValueError(
                f"engine.memory_budget_gb is {self.memory_budget_gb}; give a positive number of gigabytes, auto or None"
            )
        if not self.gradient_clipping >= 0:
            raise ValueError(f"engine.gradient_clipping is {self.gradient_clipping}; give a norm, or 0 to clip nothing")
        if not 0 < self.timeout_minutes < math.inf:
            raise ValueError(f"engine.timeout_minutes is {self.timeout_minutes}; give a positive number of minutes")


def join(world: World, config: EngineConfig) -> torch.device:
    """Every rank calls this once: joins the process group and returns the device to train on.

    Raises ConnectionError, naming the address, when the others cannot be reached in time or the port is taken.
    """
    for name in world.variables():
        _environment.setdefault(name, os.environ.get(name))
    world.export()
    # DeepSpeed would compile a shared-memory op for CPU groups: a compiler for something gloo does anyway, and a build
    # killed half-way leaves a lock that every later start waits on for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.device(deepspeed.get_accelerator().device_name(world.device_index))
        torch.accelerator.set_device_index(world.device_index)
    if world.rank > 0 and not dist.is_initialized():
        refuse_foreign_listener(world, timeout_seconds=60 * config.timeout_minutes)
    try:
        deepspeed.init_distributed(
            timeout=timedelta(minutes=config.timeout_minutes), auto_mpi_discovery=False, verbose=False
        )
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(_why_not_joined(world, str(error).splitlines()[0])) from error
    return device


def _why_not_joined(world: World, reason: str) -> str:
    who = f"rank {world.rank} of {world.world_size} (host {named_host()})"
    # Ranks met, or had no need to, and then found no way to each other: the port is not at fault.
    if "Unable to find address" in reason or "connectFullMesh" in reason or "gloo" in reason:
        chosen = os.environ.get("GLOO_SOCKET_IFNAME")
        return (
            f"{who} has no network interface to the others ({reason}); GLOO_SOCKET_IFNAME "
            + (f"names {chosen!r}" if chosen else "is not set, and the host's own name leads nowhere")
            + f"; set it to one of {[name for _, name in socket.if_nameindex()]}, the one that reaches the other hosts"
        )
    return (
        f"{who} could not meet the others at {world.master_addr}:{world.master_port} ({reason}). If the port is taken, "
        "choose another (deepspeed --master_port, torchrun --master-port); across machines check MASTER_ADDR and set "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )


_environment: dict[str, str | None] = {}
"""What `join` found where it put variables of its own."""


def leave() -> None:
    """Every rank calls this at the end: leaves the process group, if there is one. The interpreter may end after it."""
    # A process that this one starts later is no rank of the run, and must not look for it at its port.
    while _environment:
        name, value = _environment.popitem()
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    # ZeRO-3 replaces `F.linear` in the whole process for good. Networks that this process rewires later would be slower
    # and keep more: the reversible engine recognizes only torch's.
    torch.nn.functional.linear = TORCH_LINEAR
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
        _let_workers_rest()


def _let_workers_rest(*, timeout_seconds: float = 10.0) -> None:
    """Returns when no thread of gloo has anything left to do.

    A gloo thread releases the tensors of a collective a moment after the caller has its result, and needs the
    interpreter for it. On a busy machine the interpreter may have ended by then, and torch aborts the process
    (pytorch#190489). Destroying the groups does not end the threads: DeepSpeed's engines keep references to them.
    """
    deadline = time.monotonic() + timeout_seconds
    before = None
    # Idle: asleep before and after a pause, and not switched out in between, though the interpreter was free.
    while (now := _gloo_threads()) != before or any(state != "S" for state, *_ in now.values()):
        if time.monotonic() > deadline:
            deepspeed_logger.warning(f"gloo is still busy {timeout_seconds:g} s after the last collective")
            return
        before = now
        time.sleep(0.01)


def _gloo_threads() -> dict[str, tuple[str, ...]]:
    """Thread -> its state and how often it has been switched out; empty where the system does not tell."""
    threads = {}
    for task in Path("/proc/self/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended: all the better
            lines = (task / "status").read_text("utf-8").splitlines()
            status = dict(line.partition(":\t")[::2] for line in lines)
            if status["Name"] == GLOO_THREAD:
                threads[task.name] = (status["State"][0], *(status.get(kind, "") for kind in SWITCHES))
    return threads


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    factor: Callable[[int], float],
    settings: dict[str, Any],
) -> Engine:
    """Every rank calls this: the engine around `model`; learning rates follow `factor(step)` per optimizer step.

    Under ZeRO-3 `model` may still be on the host; no device then ever holds it whole.
    """
    if is_sharded_early(settings):
        shard(model, settings, device=torch.device(deepspeed.get_accelerator().current_device_name()))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, factor),
        config=settings,
        dist_init_required=False,
    )
    engine.checkpoint_engine = DurableCheckpointEngine()
    # It would put executable scripts beside every checkpoint, whose loading runs whatever a tampered file says.
    engine._copy_recovery_script = lambda folder: None
    if engine.fp16_enabled():
        # Else a bare exception ends the run at the first overflow there. The trainer counts overflows, and says more.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    if zero_stage(engine) == 0:
        _skip_non_finite_steps(engine)
    if zero_stage(engine) == 3:
        _clear_padding(engine)
    return engine


@torch.no_grad()
def _clear_padding(engine: Engine) -> None:
    """ZeRO-3 shards are of one size, and DeepSpeed leaves what a rank's shard has beyond the weight uninitialized.

    Such memory may hold NaN: it would pass for a weight that is not finite, and checkpoints would differ by chance.
    """
    optimizer = engine.optimizer
    for weight in engine.module.parameters():
        length = weight.ds_tensor.ds_numel
        own = min(max(weight.ds_numel - dist.get_rank() * length, 0), length)
        weight.ds_tensor[own:] = 0
        if weight.requires_grad:
            master, _ = optimizer._get_fp32_opt_state_partition(weight, release_swap_buffers=False)
            master[own:] = 0


def _skip_non_finite_steps(engine: Engine) -> None:
    """Without ZeRO, DeepSpeed applies whatever the gradients are; with it, it skips a step as is done here."""
    optimizer, apply = engine.optimizer, engine.optimizer.step
    optimizer.overflow = False  # what DeepSpeed looks at after a step

    def step() -> None:
        gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        here = not all_finite(gradient for gradient in gradients if gradient is not None)
        optimizer.overflow = any_rank(here, device=engine.device)
        if not optimizer.overflow:
            apply()

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # as the schedule left it, or torch warns
    optimizer.step = step


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number in them is NaN or infinite; waits for each of their devices once."""
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        sums.setdefault(tensor.device, []).append(_sum(tensor))
    return all(bool(torch.stack(of_device).isfinite().all()) for of_device in sums.values())


def _sum(tensor: Tensor) -> Tensor:
    """Not finite where a number is not; ten times as fast on a CPU as the largest absolute value."""
    return tensor.detach().sum(dtype=torch.float32)


class GradientWatch:
    """Which batches of a step gave this rank a gradient that is not finite: seen before the ranks' are summed."""

    def __init__(self, engine: Engine) -> None:
        self._seen: list[tuple[tuple[str, ...], list[Tensor]]] = []
        for weight in engine.module.parameters():
            if weight.requires_grad:
                weight.register_hook(self._look)

    def new_step(self) -> None:
        """Forgets the batches of the step before."""
        self._seen = []

    def new_batch(self, video_ids: Sequence[str]) -> None:
        """The gradients from here on are of these videos."""
        self._seen.append((tuple(video_ids), []))

    def _look(self, gradient: Tensor) -> None:
        if self._seen:
            _, total = self._seen[-1]
            here = _sum(gradient)
            total[:] = [total[0] + here if total else here]

    def culprits(self) -> list[str]:
        """The videos of the batches that were not finite on this rank."""
        return [video for videos, total in self._seen if not all_finite(total) for video in videos]


def find_non_finite(engine: Engine) -> str | None:
    """What of this rank's weights and optimizer state, or of its norms' statistics, is not finite; None if nothing."""
    optimizer = getattr(engine, "basic_optimizer", engine.optimizer)
    states = (value for state in optimizer.state.values() for value in state.values())
    parts: dict[str, Iterable[Tensor]] = {
        "the weights": master_weights(engine),
        "the weights in forward": replicated_weights(engine).values(),
        "the optimizer's state": (state for state in states if torch.is_tensor(state) and state.is_floating_point()),
        "the running statistics of norms": (
            buffer for name, buffer in engine.module.named_buffers() if name.endswith(("running_mean", "running_var"))
        ),
    }
    return next((name for name, tensors in parts.items() if not all_finite(tensors)), None)


# ---------------------------------------------------------------------------------------------------------- the weights


def zero_stage(engine: Engine) -> int:
    """0, 1, 2 or 3."""
    return int(engine.zero_optimization_stage())


def master_weights(engine: Engine) -> list[Tensor]:
    """This rank's float32 weights as the optimizer holds them: flat shards under ZeRO, else the parameters themselves.

    Their order and sizes stay the same throughout a run. Writing to them changes the model only after `publish`.
    """
    optimizer = engine.optimizer
    if zero_stage(engine) == 3:
        return [shard.data for shard in optimizer.fp32_partitioned_groups_flat]
    if zero_stage(engine) == 0:
        return [weight.data for weight in engine.module.parameters() if weight.requires_grad]
    # DeepSpeed may give stage 1 under bf16 an optimizer class of its own, whose shards have another name.
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return [shard.data for shard in optimizer.single_partition_of_fp32_groups]
    return [shard.data for shard in optimizer.fp32_groups_flat_partition]


def replicated_weights(engine: Engine) -> dict[str, Tensor]:
    """The parameters, by name, of which every rank holds a whole copy between two steps."""
    return {
        name: weight.data
        for name, weight in engine.module.named_parameters()
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


# ---------------------------------------------------------------------------------------------------- files on the disk


class DurableCheckpointEngine(TorchCheckpointEngine):
    """Writes what DeepSpeed saves through to the disk, and reads it without executing anything.

    DeepSpeed itself loads with `weights_only=False`, which runs whatever a tampered file says. Its files need four
    plain classes and no more.
    """

    SAFE_CLASSES = (LossScaler, DynamicLossScaler, fragment_address, ZeroStageEnum, OrderedDict)

    def __init__(self) -> None:
        super().__init__()
        self._failures: list[OSError] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Writes and flushes one file.

        A failure is kept for `take_failures`: DeepSpeed has barriers behind this point, and the other ranks would wait
        in them for one that raised here.
        """
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                flush(file)
        except (OSError, RuntimeError) as error:
            self._failures.append(OSError(f"{path}: {error}"))

    def take_failures(self) -> list[OSError]:
        """The errors of `save` since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one file. ValueError if it holds an object of any other class, or is no such file at all."""
        try:
            with torch.serialization.safe_globals([*self.SAFE_CLASSES]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} is not a checkpoint of this program, or was tampered with: it holds something other than "
                f"tensors and plain values, and nothing of it was executed ({str(error).strip().splitlines()[0]})"
            ) from None


def flush(file: IO[Any]) -> None:
    """Returns when what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())
