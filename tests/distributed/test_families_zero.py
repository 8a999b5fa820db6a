"""Every rewired family trains under ZeRO-2 and ZeRO-3 as it does in one process."""

from __future__ import annotations

import itertools
import os
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from distributed.ranks import run_ranks
from torch import Tensor, nn

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.training.frames import prepare_frames

# Rows of a builder share every line of code, so its first row, the smallest, stands for it.
FAMILIES = sorted({build: name for name, build in reversed(BACKBONES.items())}.values())
# Clips encoded in groups.
FAMILIES += ["videomae_nano grouped"]
# A frozen backbone, of which adapters train.
FAMILIES += ["videomae_nano temporal", *(["videomae_nano lora"] if find_spec("peft") else [])]
STEPS = {2: 1, 3: 2}
"""By stage. Only under ZeRO-3 does a second step depend on the network: it gathers what the first one has changed."""
LEARNING_RATE = 0.01


def build(name: str, *, recompute: bool = True) -> nn.Module:
    """Random parameters everywhere: several are zero or one by default, which would hide mistakes."""
    torch.manual_seed(0)
    row, _, form = name.partition(" ")
    options = {"adapter": form} if form in ("temporal", "lora") else {}
    if form == "grouped" and recompute:
        options = {"clips_at_once": 1}
    backbone = build_backbone(BackboneConfig(name=row, recompute=recompute, **options))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return backbone.eval()


def trained_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in backbone.parameters() if parameter.requires_grad]


def copies(backbone: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in backbone.named_parameters()}


def loss(backbone: nn.Module, rank: int, step: int) -> Tensor:
    """Of one clip of 6 frames, of which 5 are valid, and which backward prepares again."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    clip = torch.randint(0, 256, (1, 3, 6, 32, 32), dtype=torch.uint8, generator=generator)
    frames = prepare_frames(clip, strength=0.4, generator=generator, dtype=torch.float32)
    values = backbone(frames, torch.arange(6)[None] < 5).values
    return (values * torch.linspace(-1, 1, values.numel()).view_as(values)).mean()


def train_under_zero(*, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Steps of SGD for each family at each stage; the gathered parameters of each."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    trained = {}
    for name, stage in itertools.product(names, STEPS):
        backbone = build(name)
        engine, *_ = deepspeed.initialize(
            model=backbone,
            optimizer=torch.optim.SGD(trained_parameters(backbone), lr=LEARNING_RATE),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                # Every parameter is partitioned, however small.
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
        )
        for step in range(STEPS[stage]):
            engine.backward(loss(engine, torch.distributed.get_rank(), step))
            engine.step()
        with deepspeed.zero.GatheredParameters(list(backbone.parameters()), enabled=stage == 3):
            trained[f"{name} {stage}"] = copies(backbone)
        engine.destroy()
    return trained


@cache
def train_alone(name: str) -> list[dict[str, Tensor]]:
    """The same in one process, by plain autograd over both ranks' clips: at the start, and after each step."""
    backbone = build(name, recompute=False)
    optimizer = torch.optim.SGD(trained_parameters(backbone), lr=LEARNING_RATE)
    found = [copies(backbone)]
    for step in range(max(STEPS.values())):
        optimizer.zero_grad()
        ((loss(backbone, 0, step) + loss(backbone, 1, step)) / 2).backward()
        optimizer.step()
        found.append(copies(backbone))
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, dict[str, Tensor]]]:
    """Of each rank. One start of two processes serves all families: importing takes longer than training."""
    return run_ranks(train_under_zero, world_size=2, names=FAMILIES, timeout_seconds=280)


@pytest.mark.parametrize("stage", STEPS)
@pytest.mark.parametrize("name", FAMILIES)
def test_steps_under_zero_are_those_of_one_process(name: str, stage: int, results) -> None:
    start, *after = train_alone(name)
    for key, value in after[STEPS[stage] - 1].items():
        # What only rounding moves, such as the biases of keys, is compared with a small step instead.
        moved = max(float((value - start[key]).norm()), 1e-5)
        for trained in results:
            assert float((trained[f"{name} {stage}"][key] - value).norm()) <= 1e-3 * moved, key
