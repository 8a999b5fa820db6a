"""ZeRO-3 from the first moment: parameters are cut into the ranks' shards one by one, before any device holds them all.

    weights file --mapped--> parameter on the host -> on the device, in its type of the run -> this rank's shard, kept
                                                                                               the rest, freed

DeepSpeed itself first moves the whole model to the device of every rank, and cuts it there. transformers' own way,
HfDeepSpeedConfig, cuts while it loads; but a weight of the wrong shape is then an error on rank 0 alone, for which the
others wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from re2tal.training.deepspeed_import import deepspeed

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Section of a DeepSpeed file that enables it -> the type of the weights in forward and backward."""


def is_sharded_early(settings: Mapping[str, Any]) -> bool:
    """Whether parameters are cut before the engine is built: under ZeRO-3."""
    return settings.get("zero_optimization", {}).get("stage", 0) == 3


@torch.no_grad()
def shard(model: nn.Module, settings: Mapping[str, Any], *, device: torch.device) -> None:
    """Every rank calls this, with the same weights on the host: leaves this rank's shard of each parameter.

    Parameters stay the same objects, but are empty between steps: what looks at their shapes, such as the groups of the
    optimizer, comes before. A rank's device holds its shards and one whole parameter at most.
    """
    dtype = next((kind for name, kind in TYPES.items() if settings.get(name, {}).get("enabled")), torch.float32)
    parameters: list[Any] = list(model.parameters())  # Any: DeepSpeed gives the first one the method that cuts others
    for parameter in parameters:
        # A copy on a CPU too: DeepSpeed sends the values of rank 0 into it, and would dirty what is mapped from a file.
        parameter.data = parameter.data.to(device, dtype, copy=True)
        if parameter is parameters[0]:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=dict(settings))
        else:
            parameters[0].convert_to_zero_parameters(param_list=[parameter])
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
