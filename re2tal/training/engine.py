"""DeepSpeed, and only here: joining the processes, checking the ZeRO file, building the engine, reaching its weights.

A file in ds_configs/ says how to shard and communicate (ZeRO, offload, buckets); what the run itself decides (batch, clipping,
precision) is "auto" there and filled in. A literal in the file that contradicts the run is an error, never a silent winner.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from re2tal.distributed import World
from re2tal.strict_json import read_json

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
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

Engine = deepspeed.DeepSpeedEngine

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EngineConfig:
    """What the run decides about a step; fills the "auto" entries of the ZeRO file."""

    batch_size: int = 1
    """Clips per rank in one forward."""
    gradient_accumulation: int = 1
    """Forwards and backwards per optimizer step."""
    gradient_clipping: float = 1.0
    """Largest L2 norm of all gradients together; 0 clips nothing."""
    precision: Precision = "fp32"
    """Type of the weights in forward and backward; the optimizer keeps float32 masters."""
    timeout_minutes: float = 10.0
    """How long a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name} is {getattr(self, name)}; it must be at least 1")
        if self.gradient_clipping < 0 or self.timeout_minutes <= 0:
            raise ValueError(
                f"engine.gradient_clipping is {self.gradient_clipping} and engine.timeout_minutes {self.timeout_minutes}; "
                "the first must not be negative, the second must be positive"
            )


def join(world: World, config: EngineConfig) -> torch.device:
    """Every rank calls this once: joins the process group and returns the device to train on.

    Raises ConnectionError, naming the address, when the others cannot be reached in time or the port is taken.
    """
    world.export()
    # DeepSpeed would compile a shared-memory op for CPU groups: a compiler for something gloo does anyway, and a build killed
    # half-way leaves a lock that every later start waits on for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.device(torch.accelerator.current_accelerator().type, world.device_index)
        torch.accelerator.set_device_index(world.device_index)
    try:
        deepspeed.init_distributed(
            timeout=timedelta(minutes=config.timeout_minutes), auto_mpi_discovery=False, verbose=False
        )
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(
            f"rank {world.rank} of {world.world_size} could not meet the others at {world.master_addr}:{world.master_port} "
            f"({str(error).splitlines()[0]}). If the port is taken, choose another (deepspeed --master_port, torchrun "
            "--master-port); across machines check MASTER_ADDR and set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        ) from error
    return device


def leave() -> None:
    """Every rank calls this at the end: leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    factor: Callable[[int], float],
    settings: dict[str, Any],
) -> Engine:
    """Every rank calls this: the engine around `model`, whose learning rates follow `factor(step)` per optimizer step."""
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
    return engine


# ---------------------------------------------------------------------------------------------------------------- the ZeRO file

TOP_LEVEL = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "fp16",
    "communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
)
OWNED_BY_THE_RUN = ("optimizer", "scheduler", "checkpoint", "tensorboard", "wandb", "csv_monitor", "training_data")
SECTIONS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}


def resolve_deepspeed_config(path: Path, config: EngineConfig, *, world_size: int) -> dict[str, Any]:
    """The ZeRO file at `path` with every "auto" filled from `config`, ready for `deepspeed.initialize`.

    Raises ValueError that names the file, the key and the remedy: unreadable JSON, an unknown key, a literal that disagrees
    with the run, an "auto" nobody fills, or keys that contradict each other.
    """
    settings = _read(path)
    _refuse_unknown_keys(path, settings)
    zero = settings.setdefault("zero_optimization", {})
    for key, (value, origin) in _values_of_the_run(config, world_size).items():
        _fill(path, settings, key, value=value, origin=origin)
    for key, value in _flatten(settings):
        if value == "auto":
            raise ValueError(
                f'{path}: {key} is "auto", but a run does not decide it; write a value, or leave the key out'
            )
    _refuse_contradictions(path, settings, zero, config)
    if "offload_optimizer" in zero:
        # torch's AdamW steps offloaded shards as well; DeepSpeed's own CPU Adam would need a compiler.
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
    return settings


def _read(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}; a DeepSpeed config is one JSON object")
    return settings


def _refuse_unknown_keys(path: Path, settings: dict[str, Any]) -> None:
    for key in settings:
        if key in OWNED_BY_THE_RUN:
            raise ValueError(f"{path}: remove {key!r}; the run's own config decides it (see `re2tal train --help`)")
    _refuse_unknown(path, settings, known=TOP_LEVEL, prefix="")
    for name, schema in SECTIONS.items():
        section: Any = settings
        for part in name.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        if section is None:
            continue
        if not isinstance(section, dict):
            raise ValueError(f"{path}: {name} is {section!r}; it must be an object of settings")
        known = [alias for field, info in schema.model_fields.items() for alias in (field, info.alias) if alias]
        _refuse_unknown(path, section, known=known, prefix=f"{name}.")


def _refuse_unknown(path: Path, section: dict[str, Any], *, known: Any, prefix: str) -> None:
    for key in section:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix + nearest[0]!r}?" if nearest else f"known here: {sorted(known)}"
            raise ValueError(f"{path}: unknown key {prefix + key!r}; {hint}")


def _values_of_the_run(config: EngineConfig, world_size: int) -> dict[str, tuple[Any, str]]:
    """DeepSpeed key -> (its value in this run, where the run says so)."""
    batch, accumulation = config.batch_size, config.gradient_accumulation
    return {
        "train_micro_batch_size_per_gpu": (batch, f"engine.batch_size = {batch}"),
        "gradient_accumulation_steps": (accumulation, f"engine.gradient_accumulation = {accumulation}"),
        "train_batch_size": (
            batch * accumulation * world_size,
            f"engine.batch_size x engine.gradient_accumulation x ranks = {batch} x {accumulation} x {world_size} "
            f"= {batch * accumulation * world_size}",
        ),
        "gradient_clipping": (config.gradient_clipping, f"engine.gradient_clipping = {config.gradient_clipping}"),
        "bf16.enabled": (config.precision == "bf16", f"engine.precision = {config.precision!r}"),
        "fp16.enabled": (config.precision == "fp16", f"engine.precision = {config.precision!r}"),
    }


def _fill(path: Path, settings: dict[str, Any], key: str, *, value: Any, origin: str) -> None:
    *parents, last = key.split(".")
    section = settings
    for parent in parents:
        section = section.setdefault(parent, {})
    if section.setdefault(last, "auto") == "auto":
        section[last] = value
    elif section[last] != value or isinstance(section[last], bool) != isinstance(value, bool):
        raise ValueError(
            f'{path}: {key} is {json.dumps(section[last])}, but the run has {origin}; make them agree, or write "auto" in '
            "the file"
        )


def _flatten(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _refuse_contradictions(path: Path, settings: dict[str, Any], zero: dict[str, Any], config: EngineConfig) -> None:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    if stage == 0 and config.precision != "fp32":
        raise ValueError(
            f"{path}: ZeRO stage 0 keeps no float32 masters as used here, but the run has engine.precision = "
            f"{config.precision!r}; use stage 1 (the same memory on one device), or fp32"
        )
    if config.precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError(
            'engine.precision = "fp16" needs an accelerator, and this machine has none; use "bf16" or "fp32"'
        )
    offloads = {
        name: zero[name].get("device", "none") for name in ("offload_param", "offload_optimizer") if name in zero
    }
    for name, device in offloads.items():
        if device == "nvme":
            raise ValueError(f'{path}: zero_optimization.{name}.device is "nvme", which is not supported; use "cpu"')
    if offloads.get("offload_param", "none") != "none" and stage != 3:
        raise ValueError(
            f"{path}: zero_optimization.offload_param needs stage 3, the file has stage {stage}; remove one"
        )
    if offloads.get("offload_optimizer", "none") != "none" and stage == 0:
        raise ValueError(f"{path}: zero_optimization.offload_optimizer needs stage 1, 2 or 3, the file has stage 0")


# ------------------------------------------------------------------------------------------------------------------ the weights


def zero_stage(engine: Engine) -> int:
    """0, 1, 2 or 3."""
    return int(engine.zero_optimization_stage())


def master_weights(engine: Engine) -> list[Tensor]:
    """This rank's float32 weights as the optimizer holds them: flat shards under ZeRO, the parameters themselves without.

    Their order and sizes stay the same throughout a run. Writing to them changes the model only after `publish`.
    """
    optimizer = engine.optimizer
    if zero_stage(engine) == 3:
        return [shard.data for shard in optimizer.fp32_partitioned_groups_flat]
    if zero_stage(engine) == 0:
        return [weight.data for weight in engine.module.parameters() if weight.requires_grad]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return [shard.data for shard in optimizer.single_partition_of_fp32_groups]
    return [shard.data for shard in optimizer.fp32_groups_flat_partition]


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
    """Every rank calls this; rank 0 gets all float32 weights and buffers by name, on the CPU, the others an empty dict."""
    is_main = dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    saved = set(engine.module.state_dict(keep_vars=True))
    for name, parameter in engine.module.named_parameters():
        with whole(parameter):
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


# ------------------------------------------------------------------------------------------------------------- files on the disk


class DurableCheckpointEngine(TorchCheckpointEngine):
    """Writes what DeepSpeed saves through to the disk, and reads it without executing anything.

    DeepSpeed itself loads with `weights_only=False`, which runs whatever a tampered file says. Its files need three plain
    classes and no more.
    """

    SAFE_CLASSES = (LossScaler, fragment_address, ZeroStageEnum, OrderedDict)

    def __init__(self) -> None:
        super().__init__()
        self._failures: list[OSError] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Writes and flushes one file. A failure is kept for `take_failures`: DeepSpeed has barriers after this point, and
        the other ranks would wait in them for one that raised."""
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                flush(file)
        except (OSError, RuntimeError) as error:
            self._failures.append(OSError(f"{path}: {error}"))

    def take_failures(self) -> list[OSError]:
        """What went wrong in `save` since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one file; an object of any other class in it is an error."""
        with torch.serialization.safe_globals([*self.SAFE_CLASSES]):
            return torch.load(path, map_location=map_location, weights_only=True)


def flush(file: IO[Any]) -> None:
    """Returns when what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())
