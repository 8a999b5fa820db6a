"""Rewired models under FSDP2 and DDP: the gradients of one process, or an error that says what to do."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import run_ranks
from rewire.networks import Block, Downsample, Walker, frames, seeded, walker
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.rewire import RewiringConfig, rewire


def gradients(net: nn.Module, forward: nn.Module) -> list[torch.Tensor]:
    net.zero_grad()
    forward(frames()).square().sum().backward()
    found = [parameter.grad for parameter in net.parameters()]
    return [torch.zeros(()) if one is None else getattr(one, "full_tensor", one.clone)().clone() for one in found]


def agrees(net: nn.Module, wrap) -> bool:
    """Two steps: the second finds what the first left behind."""
    reference = copy.deepcopy(net)
    wanted, forward = gradients(reference, reference), wrap(net)
    return all(
        torch.allclose(one, other) for _ in range(2) for one, other in zip(gradients(net, forward), wanted, strict=True)
    )


def sharded(parts: list[str]):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def wrap(net: nn.Module) -> nn.Module:
        for part in parts:
            fully_shard(net.get_submodule(part), mesh=mesh)
        return net

    return wrap


def flat(**options):
    return lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu"), **options)


def attempt(build, wrap) -> str:
    try:
        return str(agrees(build(), wrap))
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def rewired(*kinds: type[nn.Module], **options) -> nn.Module:
    net = walker(*(kinds or (Block, Block, Block)))
    rewire(net, config=RewiringConfig(**options))
    return net


class Straight(Walker):
    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


def two_runs() -> nn.Module:
    net = seeded(lambda: Straight(Block(), Block(), Downsample(2), Block(), Block()))
    rewire(net)
    return net


def tied() -> nn.Module:
    net = walker(Block, Block, Block)
    net.layers[1].mixer.weight = net.layers[0].mixer.weight
    rewire(net)
    return net


class Twice(nn.Module):
    """Calls a stage twice, and nothing else is trained, so that all parameters have a part after one call."""

    def __init__(self) -> None:
        super().__init__()
        self.walker = rewired()
        self.walker.stem.requires_grad_(False)

    def forward(self, x):
        return self.walker(x) + self.walker(2 * x)


def clips_in_groups(**options) -> str:
    backbone = build_backbone(BackboneConfig(name="videomae_nano", clips_at_once=1))
    net = DistributedDataParallel(backbone, **options)
    video, mask = torch.randn(1, 3, 8, 32, 32), torch.ones(1, 8, dtype=torch.bool)
    try:
        net(video, mask).values.sum().backward()
    except ValueError as error:
        return str(error)
    return "no error"


def try_all() -> dict[str, str]:
    dist.init_process_group("gloo")
    blocks = ["layers.0", "layers.1", "layers.2"]
    found = {
        "model": attempt(rewired, sharded([""])),
        "stage": attempt(rewired, sharded(["layers", ""])),
        "inside": attempt(rewired, sharded(["layers.0.mlp", "layers.2.mixer", ""])),
        "blocks": attempt(rewired, sharded([*blocks, ""])),
        "one block": attempt(rewired, sharded(["layers.1", ""])),
        "whole blocks": attempt(lambda: rewired(unit="block"), sharded([*blocks, ""])),
        "segments": attempt(lambda: rewired(segment=2), sharded(["layers", ""])),
        "two runs": attempt(two_runs, sharded(["layers", ""])),
        "flat": attempt(rewired, flat()),
        "flat, parameters kept": attempt(rewired, flat(use_orig_params=True)),
        "handle": attempt(rewired, lambda net: fully_shard(net.layers[0])),
        "ddp": attempt(rewired, DistributedDataParallel),
        "unused": attempt(rewired, lambda net: DistributedDataParallel(net, find_unused_parameters=True)),
        "tied": attempt(tied, DistributedDataParallel),
        "twice": attempt(Twice, DistributedDataParallel),
        "twice, static": attempt(Twice, lambda net: DistributedDataParallel(net, static_graph=True)),
        "groups": clips_in_groups(),
        "groups, static": clips_in_groups(static_graph=True),
        "tied, static": attempt(tied, lambda net: DistributedDataParallel(net, static_graph=True)),
    }
    dist.destroy_process_group()
    return found


FOUND = {
    "model": "True",
    "stage": "True",
    "inside": "True",
    "whole blocks": "True",
    "segments": "True",
    "two runs": "True",
    "ddp": "True",
    "tied, static": "True",
    "twice, static": "True",
    "groups, static": "no error",
    "groups": "clips are encoded in groups .* give it static_graph=True",
    "twice": "RuntimeError: DistributedDataParallel took .* give it static_graph=True",
    "blocks": "RewireError: block layers.0 is a unit of FSDP, .* or rewire with unit 'block'",
    "one block": "RewireError: block layers.1 is a unit of FSDP, .* give fully_shard the stage",
    "flat": "RewireError: the parameters of block layers.0 .* use torch.distributed.fsdp.fully_shard",
    "flat, parameters kept": "RewireError: the parameters of block layers.0 .* use torch.distributed.fsdp.fully_shard",
    "handle": "TypeError: block 0 of layers is no module here .*fully_shard",
    "unused": "RuntimeError: DistributedDataParallel took .* or, .* leave find_unused_parameters out",
    "tied": "RuntimeError: DistributedDataParallel took .* give it static_graph=True",
}


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return run_ranks(try_all, world_size=1)[0]


@pytest.mark.parametrize("name", FOUND)
def test_it_works_or_says_what_to_do(name, found) -> None:
    assert re.match(FOUND[name], found[name]), found[name]
