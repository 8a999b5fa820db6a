"""DeepSpeed, imported here and only here: the accelerator it takes is named first, and it logs warnings at most."""

from __future__ import annotations

import logging
import os
from typing import TypeAlias

import torch

# DeepSpeed chooses once, on import; without a name it searches, and warns that it found no device.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

try:
    import deepspeed
except ImportError as error:
    raise ValueError(f"training needs DeepSpeed, and DeepSpeed needs Linux: pip install deepspeed ({error})") from error
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address

__all__ = [
    "DeepSpeedBF16Config",
    "DeepSpeedFP16Config",
    "DeepSpeedZeroConfig",
    "DeepSpeedZeroOffloadOptimizerConfig",
    "DeepSpeedZeroOffloadParamConfig",
    "DynamicLossScaler",
    "Engine",
    "LossScaler",
    "TorchCheckpointEngine",
    "ZeroStageEnum",
    "deepspeed",
    "deepspeed_logger",
    "fragment_address",
    "safe_get_full_fp32_param",
]

deepspeed_logger.setLevel(logging.WARNING)

Engine: TypeAlias = deepspeed.DeepSpeedEngine
