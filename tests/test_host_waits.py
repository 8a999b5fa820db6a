"""On tensors that have no numbers, forward, loss and backward need none: nothing waits for the device.

A number that the host needs, a choice by mask and a copy that blocks each make the host wait until a CUDA device has
done all it was given. Tensors of torch's meta device stand for those of a device here: they cannot answer the first
two, and the third is seen as it is dispatched, as is an operation that mixes devices. Rewired runs need a device with
autocast and generators: for them it is fake tensors on the CPU, which cannot answer either. No GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from localizers.test_contract import ACTIONS, CLASSES, SECONDS, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.localizers import LOCALIZERS, build_localizer
from re2tal.recognizer import Recognition, Recognizer, RecognizerConfig
from re2tal.reversible.fake import on_fake_tensors
from re2tal.structures import Features

DEVICE = torch.device("meta")
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)


class Waits(TorchDispatchMode):
    """Collects operations that copy between host and device while the host waits, or that mix the two."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
        devices = {leaf.device.type for leaf in leaves if leaf.ndim or function.overloadpacket in COPIES}
        named = {argument.name: value for argument, value in zip(function._schema.arguments, args, strict=False)}
        blocks = not (named | (kwargs or {})).get("non_blocking", False)
        if len(devices) > 1 and (blocks or function.overloadpacket not in COPIES):
            self.found.append(f"{function} of {[(leaf.device.type, tuple(leaf.shape)) for leaf in leaves]}")
        return output


def waits(run: Callable[[], object]) -> list[str]:
    """What waits in `run`, which is called twice: what a module makes once does not count."""
    run()
    with Waits() as mode, pytest.MonkeyPatch.context() as patch:
        make = torch.tensor

        def tensor(*args, **kwargs):
            if kwargs.get("device") is not None:  # made on the host and copied, which meta tensors leave out
                mode.found.append(f"torch.tensor on {kwargs['device']}")
            return make(*args, **kwargs)

        patch.setattr(torch, "tensor", tensor)
        run()
    return mode.found


def test_what_waits_is_noticed() -> None:
    ones = torch.ones(3, device=DEVICE)
    for ask in (lambda: ones.sum().item(), lambda: ones[ones > 0], lambda: ones.tolist(), lambda: ones.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


def test_what_blocks_is_noticed() -> None:
    def copy() -> None:
        torch.tensor([1.0, 2.0], device=DEVICE)
        torch.zeros(3).to(DEVICE)
        torch.zeros(3).to(DEVICE, non_blocking=True)
        torch.zeros(3, device=DEVICE).copy_(torch.zeros(3))
        torch.zeros(3, device=DEVICE) + torch.tensor(1.0)

    assert len(waits(copy)) == 3


@pytest.mark.parametrize("name", sorted(LOCALIZERS))
def test_no_localizer_waits(name: str) -> None:
    with DEVICE:
        localizer = build_localizer(tiny(name), in_channels=6, classes=CLASSES)

    def step() -> None:
        mask = torch.ones(2, 32, dtype=torch.bool, device=DEVICE)
        outputs = localizer(Features(torch.zeros(2, 6, 32, device=DEVICE), mask))
        total = localizer.loss(outputs, [ACTIONS, []], [SECONDS, SECONDS])["total"]
        assert total.device == DEVICE
        total.backward()

    assert waits(step) == []


@pytest.mark.parametrize(("name", "chunk_mebibytes"), [("swin3d_nano", 1e-2), ("slowfast_nano", None)])
def test_no_rewired_backbone_waits(name: str, chunk_mebibytes: float | None) -> None:
    config = BackboneConfig(name=name, norm_eval=True, chunk_mebibytes=chunk_mebibytes)
    backbone, mode = on_fake_tensors(lambda: build_backbone(config), dtype=torch.float32, device=torch.device("cpu"))

    def step() -> None:
        values, _ = backbone(torch.zeros(1, 3, 16, 32, 32), torch.ones(1, 16, dtype=torch.bool))
        values.sum().backward()

    with mode:
        assert waits(step) == []


def test_no_recognizer_waits() -> None:
    with DEVICE:
        backbone = build_backbone(BackboneConfig(name="swin3d_nano"))
        recognizer = Recognizer(backbone, RecognizerConfig(), classes=CLASSES)

    def loss() -> None:
        outputs = Recognition(torch.zeros(2, 3, device=DEVICE), torch.ones(2, dtype=torch.bool, device=DEVICE))
        recognizer.loss(outputs, [ACTIONS[:1], ACTIONS[1:2]], [SECONDS, SECONDS], num_frames=8)

    assert waits(loss) == []
