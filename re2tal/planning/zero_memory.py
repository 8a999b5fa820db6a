"""What DeepSpeed holds on the device of one rank besides activations, by ZeRO stage.

With T trained numbers, n ranks, b bytes per number in forward and backward, and G numbers in the largest group:

               parameters       optimizer    gradients kept for the step    one group's step
    ZeRO 0     b T              8 T          b T, where backward makes them 12 bytes a number, of one tensor on a CPU
    ZeRO 1     b T              12 T / n     the same, and b T / n          12 G / n
    ZeRO 2     b T              12 T / n     b T / n                        12 G / n
    ZeRO 3     b T / n, and b   12 T / n     b T / n                        12 G / n
               for what is whole

The optimizer's are float32 masters (none without ZeRO) and AdamW's two moments; offloaded they are on the host, with
the gradients. Buckets for communication come on top. Followed through DeepSpeed 0.19 storage by storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from re2tal.training.optimizer import OptimizerConfig, parameter_groups
from re2tal.training.sharding import is_sharded_early

DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in numbers."""
# These three are DeepSpeed's as well: stage3_max_live_parameters and so on.
DEFAULT_SUB_GROUP = 1_000_000_000
DEFAULT_MAX_LIVE = 1_000_000_000
DEFAULT_PERSISTENCE = 100_000
MASTERS_AND_MOMENTS, MOMENTS, STEP = 12, 8, 12
"""Bytes per number; of the step: the gradient in float32, and two temporaries of AdamW."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of a model, counted."""

    trained: int
    frozen: int
    largest: int
    """Numbers of the largest trained parameter."""
    largest_group: int
    """Numbers of the optimizer's largest group."""
    persistent: int
    """Numbers of parameters that ZeRO-3 leaves whole, by the file's threshold."""
    largest_of_all: int = 0
    """Numbers of the largest parameter, trained or frozen."""

    @classmethod
    def of(cls, model: nn.Module, optimizer: OptimizerConfig, settings: Mapping[str, Any]) -> Weights:
        """Of `model`, on any device, the meta device too."""
        every = list(model.parameters())
        trained = [parameter.numel() for parameter in every if parameter.requires_grad]
        threshold = _zero(settings).get("stage3_param_persistence_threshold", DEFAULT_PERSISTENCE)
        groups = parameter_groups(model, optimizer)
        return cls(
            trained=sum(trained),
            frozen=sum(parameter.numel() for parameter in every if not parameter.requires_grad),
            largest=max(trained),
            largest_group=max(sum(parameter.numel() for parameter in group["params"]) for group in groups),
            # Small parameters stay whole: to gather each would cost more time than its bytes are worth.
            persistent=sum(parameter.numel() for parameter in every if parameter.numel() <= threshold),
            largest_of_all=max(parameter.numel() for parameter in every),
        )


@dataclass(frozen=True, slots=True)
class ZeroMemory:
    """Bytes on the device of one rank; those on the host in `host`."""

    parameters: int
    optimizer: int
    average: int
    """The moving average of the weights."""
    step_gradients: int
    """Gradients alive when the optimizer steps, after all activations are freed."""
    step_scratch: int
    """Temporary memory of that step."""
    gathered: int = 0
    """ZeRO-3: the most that gathered parameters take; small ones stay gathered, others while they are needed."""
    gradients: int = 0
    """Kept until the optimizer's step, in addition to those that backward leaves on the parameters."""
    buckets: int = 0
    """For communication during backward."""
    host: int = 0
    loading: int = 0
    """The most before the first step, while parameters come to the device and are cut into shards."""

    @property
    def standing(self) -> int:
        """Alive all the time."""
        return self.parameters + self.optimizer + self.average

    @property
    def step(self) -> int:
        """Needed by the optimizer's step, in addition to `standing`."""
        return self.step_gradients + self.step_scratch

    @property
    def during_backward(self) -> int:
        """Alive during forward and backward."""
        return self.standing + self.gathered + self.gradients + self.buckets


def zero_memory(
    weights: Weights, settings: Mapping[str, Any], *, bytes_each: int, world_size: int, averaged: bool, on_cpu: bool
) -> ZeroMemory:
    """For the settings that `resolve_deepspeed_config` returns.

    `bytes_each`: of a parameter in forward and backward; `averaged`: whether the run keeps a moving average.
    """
    zero, every = _zero(settings), weights.trained + weights.frozen
    zero_stage, bucket = zero.get("stage", 0), bytes_each * int(zero.get("reduce_bucket_size", DEFAULT_BUCKET))
    # -(-a // b) rounds up: the last rank's shard is padded.
    shard, shard_of_all = -(-weights.trained // world_size), -(-every // world_size)
    parameters_on_host = bytes_each * shard_of_all if _is_on_host(zero, "offload_param") else 0
    if is_sharded_early(settings):
        # The shards and one whole parameter.
        loading = bytes_each * (shard_of_all + weights.largest_of_all) - parameters_on_host
    else:
        # Networks are built in float32. A parameter and its narrow copy are alive together while it is converted.
        loading = 4 * every + (bytes_each * weights.largest_of_all if bytes_each < 4 else 0)
    if zero_stage == 0:
        return ZeroMemory(
            parameters=bytes_each * every,
            optimizer=MOMENTS * weights.trained,
            average=4 * weights.trained * averaged,
            step_gradients=bytes_each * weights.trained,
            step_scratch=_scratch_of_0(weights, world_size, on_cpu=on_cpu),
            loading=loading,
        )
    memory = ZeroMemory(
        parameters=bytes_each * every,
        gradients=bytes_each * shard,
        optimizer=MASTERS_AND_MOMENTS * shard,
        average=4 * shard * averaged,
        # Overlapping fills one bucket while the other is sent.
        buckets=bucket * (2 if zero.get("overlap_comm", False) else 1),
        step_gradients=bytes_each * shard,
        step_scratch=STEP * -(-weights.largest_group // world_size),
        loading=loading,
    )
    if zero_stage == 3:
        # Whole between steps, and sharded while the optimizer works.
        live = min(every - weights.persistent, zero.get("stage3_max_live_parameters", DEFAULT_MAX_LIVE))
        group = min(weights.largest_group, zero.get("sub_group_size", DEFAULT_SUB_GROUP))
        memory = replace(
            memory,
            parameters=bytes_each * shard_of_all - parameters_on_host,
            # On one rank the shard is the parameter.
            gathered=bytes_each * (weights.persistent + live) if world_size > 1 else 0,
            buckets=bucket,
            step_scratch=STEP * -(-group // world_size) + bucket,  # which stage 3 keeps
            host=parameters_on_host,
        )
    if not _is_on_host(zero, "offload_optimizer"):
        return memory
    # With the gradients in float32, the shard in the parameters' type, and before ZeRO 3 a tensor to put them through.
    through = 0 if zero_stage == 3 else 4 * weights.largest
    return replace(
        memory,
        **dict.fromkeys(("gradients", "optimizer", "average", "step_gradients"), 0),
        step_scratch=bucket if zero_stage == 3 else 0,
        host=memory.host + memory.optimizer + memory.average + (4 + bytes_each) * shard + through,
    )


def _scratch_of_0(weights: Weights, world_size: int, *, on_cpu: bool) -> int:
    # AdamW goes through tensors one by one on a CPU, through all of a group at once elsewhere.
    at_once = weights.largest if on_cpu else weights.largest_group
    # DeepSpeed sums gradients in buckets of this size, in float32.
    flat = 4 * min(weights.trained, DEFAULT_BUCKET) if world_size > 1 else 0  # whatever the file says
    return max(flat, STEP * at_once)


def _zero(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    return settings.get("zero_optimization", {})


def _is_on_host(zero: Mapping[str, Any], name: str) -> bool:
    return zero.get(name, {}).get("device", "none") == "cpu"
