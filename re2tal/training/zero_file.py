"""Fills the "auto" entries of a ZeRO file from the run, and refuses entries that contradict it.

The file says how to shard and communicate (ZeRO, offload, buckets); what the run itself decides (batch, clipping,
precision) is "auto" there. A literal that contradicts the run is an error, never a silent winner.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from re2tal.options import flatten
from re2tal.strict_json import read_json
from re2tal.training.config import EngineConfig
from re2tal.training.deepspeed_import import (
    DeepSpeedBF16Config,
    DeepSpeedFP16Config,
    DeepSpeedZeroConfig,
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

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
    "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
)
SECTIONS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}
"""Section of a DeepSpeed file -> the schema that knows its keys."""
OFFLOADS = {"offload_param": "cpu_offload_param", "offload_optimizer": "cpu_offload"}
"""And what they were called."""

MASTERS = "the optimizer and the moving average would keep numbers of 16 bits, in which small changes vanish"
HARMFUL: dict[tuple[str, str, bool], str] = {
    ("zero_optimization", "round_robin_gradients", True): "DeepSpeed 0.19 takes the weights of one parameter for those "
    "of another when it gathers them, so that a wrong model is exported; begin a run anew that has trained so",
    ("zero_optimization", "elastic_checkpoint", True): "DeepSpeed cannot load what it saves so, and no run resumes",
    ("zero_optimization", "load_from_fp32_weights", False): "a resumed run would go on from rounded weights",
    ("zero_optimization", "legacy_stage1", True): "DeepSpeed has no such stage any more",
    ("bf16", "check_grad_overflow", False): "steps that are not finite would be applied",
    ("bf16", "bf16_master_weights_and_grads", True): MASTERS,
    ("bf16", "bf16_optimizer_states", True): MASTERS,
    ("fp16", "fp16_master_weights_and_grads", True): MASTERS,
}
"""Section, key and value under which a run goes wrong without a word, or cannot begin or go on -> why."""

# DeepSpeed would take these over from the file, beside what this program builds and writes itself.
OWNED_BY_THE_RUN = ("optimizer", "scheduler", "checkpoint", "tensorboard", "wandb", "csv_monitor", "training_data")


def resolve_deepspeed_config(path: Path, config: EngineConfig, *, world_size: int) -> dict[str, Any]:
    """The ZeRO file at `path` with every "auto" filled from `config`, ready for `deepspeed.initialize`.

    Raises ValueError that names the file, the key and the remedy: unreadable JSON, an unknown key, a literal that
    disagrees with the run, an "auto" nobody fills, or keys that contradict each other.
    """
    settings = _read(path)
    # First of all: DeepSpeed ignores unknown keys at the top, and a misspelt one that says "auto" is never filled.
    _refuse_unknown_keys(path, settings)
    zero = settings.setdefault("zero_optimization", {})
    for name, old in OFFLOADS.items():
        # DeepSpeed takes it, behind the back of what is checked and set here.
        if zero.get(old):
            raise ValueError(f'{path}: zero_optimization.{old} is an old name; write "{name}": {{"device": "cpu"}}')
        # DeepSpeed's own default.
        if zero.get(name, {}) is None:
            del zero[name]
    for key, (value, origin) in _values_of_the_run(config, world_size).items():
        _fill(path, settings, key, value=value, origin=origin)
    for key, value in flatten(settings):
        if value == "auto":
            raise ValueError(
                f'{path}: {key} is "auto", but a run does not decide it; write a value, or leave the key out'
            )
    _refuse_contradictions(path, zero, config)
    _refuse_wrong_values(path, settings)
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
            raise ValueError(f"{path}: remove {key!r}; the run's own config decides it (see `re2tal train --help-all`)")
    _refuse_unknown(path, settings, known=TOP_LEVEL, prefix="")
    for name, schema in SECTIONS.items():
        section: Any = settings
        for part in name.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        if section is None and settings.get(name, {}) is not None:
            continue
        if not isinstance(section, dict):
            raise ValueError(f"{path}: {name} is {section!r}; it must be an object of settings")
        known = [alias for field, info in schema.model_fields.items() for alias in (field, info.alias) if alias]
        _refuse_unknown(path, section, known=known, prefix=f"{name}.")


def _refuse_unknown(path: Path, section: dict[str, Any], *, known: Iterable[str], prefix: str) -> None:
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
    # 1 == True in Python, and "enabled": 1 is not what DeepSpeed expects.
    elif section[last] != value or isinstance(section[last], bool) != isinstance(value, bool):
        raise ValueError(
            f"{path}: {key} is {json.dumps(section[last])}, but the run has {origin}; make them agree, or write "
            '"auto" in the file'
        )


def _refuse_wrong_values(path: Path, settings: dict[str, Any]) -> None:
    """DeepSpeed's own check of each section, in words that name the file."""
    for name, schema in SECTIONS.items():
        # A nested section is checked with the one that holds it.
        if "." in name or name not in settings:
            continue
        try:
            section = schema(**settings[name])
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([name, *map(str, first["loc"])])
            raise ValueError(f"{path}: {key} is {json.dumps(first['input'])}: {first['msg']}; correct it") from None
        for (owner, key, value), reason in HARMFUL.items():
            # Of the section as DeepSpeed reads it, which takes "yes" for true.
            if owner == name and getattr(section, key) is value:
                raise ValueError(f"{path}: {name}.{key} is {json.dumps(value)}: {reason}; leave the key out")


def _refuse_contradictions(path: Path, zero: dict[str, Any], config: EngineConfig) -> None:
    stage = zero.get("stage", 0)  # DeepSpeed's default
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
    offloads = {name: zero[name].get("device", "none") for name in OFFLOADS if name in zero}
    for name, device in offloads.items():
        if device == "nvme":
            raise ValueError(f'{path}: zero_optimization.{name}.device is "nvme", which is not supported; use "cpu"')
    if offloads.get("offload_param", "none") != "none" and stage != 3:
        raise ValueError(
            f"{path}: zero_optimization.offload_param needs stage 3, the file has stage {stage}; remove one"
        )
    if offloads.get("offload_optimizer", "none") != "none" and stage == 0:
        raise ValueError(f"{path}: zero_optimization.offload_optimizer needs stage 1, 2 or 3, the file has stage 0")
