"""Every rewired family trains under ZeRO-2 and ZeRO-3 as it does in one process."""

from __future__ import annotations

import os

import pytest
import torch
from distributed.ranks import run_ranks
from torch import Tensor, nn

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone

# Rows of a builder share every line of code, so its first row, the smallest, stands for it.
FAMILIES = sorted({build: name for name, build in reversed(BACKBONES.items())}.values())
LEARNING_RATE = 0.1
STEPS = 2


def build(name: str) -> nn.Module:
    """Random parameters everywhere: several are zero or one by default, which would hide mistakes."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return backbone.eval()


def loss(backbone: nn.Module, rank: int, step: int) -> Tensor:
    """Of one clip of 6 frames, of which 5 are valid."""
    frames = torch.randn(1, 3, 6, 32, 32, generator=torch.Generator().manual_seed(10 * step + rank))
    values = backbone(frames, torch.arange(6)[None] < 5).values
    return (values * torch.linspace(-1, 1, values.numel()).view_as(values)).mean()


def train_under_zero(*, names: list[str], stage: int) -> dict[str, dict[str, Tensor]]:
    """Two steps of SGD for each family; the gathered parameters of each."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    trained = {}
    for name in names:
        backbone = build(name)
        engine, *_ = deepspeed.initialize(
            model=backbone,
            optimizer=torch.optim.SGD(backbone.parameters(), lr=LEARNING_RATE),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                # Every parameter is partitioned, however small.
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
        )
        for step in range(STEPS):
            engine.backward(loss(engine, torch.distributed.get_rank(), step))
            engine.step()
        with deepspeed.zero.GatheredParameters(list(backbone.parameters()), enabled=stage == 3):
            trained[name] = {key: value.detach().clone() for key, value in backbone.named_parameters()}
        engine.destroy()
    torch.distributed.destroy_process_group()
    return trained


def train_alone(name: str) -> dict[str, Tensor]:
    """The same in one process, by plain autograd over both ranks' clips."""
    backbone = build(name)
    for module in backbone.modules():
        if hasattr(module, "config") and hasattr(module.config, "recompute"):
            module.config = type(module.config)(recompute=False)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        ((loss(backbone, 0, step) + loss(backbone, 1, step)) / 2).backward()
        optimizer.step()
    return dict(backbone.named_parameters())


@pytest.mark.parametrize("stage", [2, 3])
def test_two_steps_under_zero_are_those_of_one_process(stage: int) -> None:
    results = run_ranks(train_under_zero, world_size=2, names=FAMILIES, stage=stage, timeout_seconds=280)
    for name in FAMILIES:
        start, wanted = dict(build(name).named_parameters()), train_alone(name)
        for key, value in wanted.items():
            moved = max(float((value - start[key]).norm()), 1e-5)
            for trained in results:
                assert float((trained[name][key] - value).norm()) <= 1e-3 * moved, (name, key)
