"""The configuration of steps and of training.

Apart from the engine and the trainer, so that commands that do not train need not import DeepSpeed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from re2tal.options import COUNT, NOT_NEGATIVE, POSITIVE, RATE, check_ranges, option

WeightType = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[WeightType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EngineConfig:
    """Batch, precision and limits of a step; they fill the "auto" entries of the ZeRO file."""

    batch_size: int = option(1, within=COUNT)
    """Clips per rank in one forward."""
    gradient_accumulation: int = option(1, within=COUNT)
    """Forwards and backwards per optimizer step."""
    gradient_clipping: float = option(1.0, within=NOT_NEGATIVE)
    """Largest L2 norm of all gradients together; 0 clips nothing."""
    precision: WeightType = "fp32"
    """Type of the weights in forward and backward; the optimizer keeps float32 masters."""
    memory_budget_gb: float | Literal["auto"] | None = option(None, resumable=True)
    """Gigabytes (10^9 bytes) of a rank's device that a step may need. The planner picks, per stage, the fastest way to
    stay under this: store, recompute, or recompute in chunks. It overrides backbone.recompute, chunk_mebibytes, known,
    keep_nonresidual and offload. "auto" takes most of the device's free memory at the start; on a CPU, of the system's,
    shared by the ranks of a machine. None: no plan."""
    timeout_minutes: float = option(10.0, within=POSITIVE, resumable=True, planned=False)
    """How long a rank waits for the others before it names who is missing and gives up, or, if it is the only one,
    makes no progress before it ends; three times as long where a rank may take its time: start-up, the first step, a
    checkpoint, the export."""

    def __post_init__(self) -> None:
        check_ranges(self, "engine")
        if not (self.memory_budget_gb in ("auto", None) or 0 < float(self.memory_budget_gb) < math.inf):
            raise ValueError(
                f"engine.memory_budget_gb is {self.memory_budget_gb}; give a positive number of gigabytes, auto or None"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """Length of training, logging, evaluation and checkpoints."""

    epochs: int = option(20, within=COUNT, resumable=True)
    """Passes over the training shards. A resumed run may be made longer: from there on, its learning rate follows the
    course of the new length."""
    seed: int = option(0, within=NOT_NEGATIVE)
    """Seed of everything random: initial weights, data order, augmentation, drop path."""
    average_decay: float | None = option(0.999, within=RATE)
    """Decay of the moving average of the weights that evaluation and the exported model use; None averages nothing."""
    log_every_steps: int = option(10, within=COUNT, resumable=True)
    """Optimizer steps between two log lines."""
    evaluate_every_epochs: int | None = option(None, within=COUNT, resumable=True)
    """Epochs between two evaluations; None evaluates once, at the end."""
    evaluate_from_epoch: int = option(0, within=NOT_NEGATIVE, resumable=True)
    """No evaluation before so many epochs are done."""
    keep_best: bool = option(False, resumable=True)
    """Export the weights of the best evaluation, by average mAP or top-1 accuracy, and the last ones beside them
    (last.safetensors). They are chosen on the validation subset, so their figures there are biased upwards."""
    checkpoint_every_steps: int = option(500, within=COUNT, resumable=True)
    """Optimizer steps between two checkpoints; one more is written at the end, and when the run is told to stop."""
    keep_checkpoints: int = option(2, within=COUNT, resumable=True)
    """How many of the newest checkpoints to keep."""
    trackers: tuple[str, ...] = option(("tensorboard",), resumable=True)
    """Where the course of the run can be watched, besides its folder: tensorboard, wandb, mlflow, comet_ml, aim,
    clearml, dvclive, swanlab or trackio, whose package has to be installed. Give none to watch nowhere else."""
    max_non_finite: int = option(10, within=COUNT, resumable=True)
    """Give up after this many batches or steps in a row that were not finite."""

    def __post_init__(self) -> None:
        check_ranges(self, "training")
        if self.keep_best and self.evaluate_every_epochs is None:
            raise ValueError(
                "training.keep_best is true, but training.evaluate_every_epochs is null, so that there is one "
                "evaluation and nothing to choose from; set the latter, or keep_best to false"
            )
