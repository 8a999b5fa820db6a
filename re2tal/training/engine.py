"""Builds the DeepSpeed engine around a network, and repairs some of what it does.

`re2tal.training.zero_file` turns a file of ds_configs/ and an EngineConfig into the settings the engine is built with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from re2tal.distributed import any_rank
from re2tal.training.checkpoint_files import DurableCheckpointEngine
from re2tal.training.deepspeed_import import Engine, deepspeed
from re2tal.training.engine_weights import zero_stage
from re2tal.training.finite import all_finite
from re2tal.training.sharding import is_sharded_early, shard


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, factor: Callable[[int], float], settings: dict[str, Any]
) -> Engine:
    """Every rank calls this: the engine around `model`; learning rates follow `factor(step)` per optimizer step.

    Under ZeRO-3 `model` may still be on the host; no device then ever holds it whole.
    """
    if is_sharded_early(settings):
        shard(model, settings, device=torch.device(deepspeed.get_accelerator().current_device_name()))
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, factor),
            config=settings,
            # `process_group.join` has joined it.
            dist_init_required=False,
        )
    # Keys that exclude each other, in DeepSpeed's words.
    except (AssertionError, deepspeed.DeepSpeedConfigError) as error:
        raise ValueError(f"DeepSpeed refuses the settings of the DeepSpeed file: {error}; correct the file") from error
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
    """Sets the padding of ZeRO-3 shards to 0. All shards have one size; DeepSpeed leaves what lies beyond the weight
    uninitialized.

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
        # All ranks or none: one that skipped alone would have other weights from then on.
        optimizer.overflow = any_rank(here, device=engine.device)
        if not optimizer.overflow:
            apply()

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # as the schedule left it, or torch warns
    optimizer.step = step
