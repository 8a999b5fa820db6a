"""Every family, rewired, is the network that it was at beta = 0; `re2tal rewire` compares them each time."""

from __future__ import annotations

import pytest
import torch

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.cli import main
from re2tal.rewire import Branch, RewireError, check_same_network
from re2tal.rewire.stage import RewiredStage
from re2tal.runs.rewiring import example_of


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.endswith("_nano")])
def test_every_family_is_the_same_network_at_beta_0(name) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name))
    check_same_network(backbone, example_of(backbone))


def test_a_wrong_branch_of_a_family_is_named() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="vit_nano"))
    stage = next(module for module in backbone.modules() if isinstance(module, RewiredStage))
    first, second = stage.residual["1"].branches
    wrong = Branch(first.name, lambda block, x, *args, **kwargs: x + first.function(block, x, *args, **kwargs))
    stage.residual["1"] = type(stage.residual["1"])((wrong, second), stage.residual["1"].wrap, kinks=False)
    with pytest.raises(RewireError, match=r"is another network: output\[0\] differs .* it starts in block .*\.1: the"):
        check_same_network(backbone, example_of(backbone))


def test_the_command_compares(monkeypatch, capsys) -> None:
    compared = []
    monkeypatch.setattr("re2tal.runs.rewiring.check_same_network", lambda *args: compared.append(args))
    with pytest.raises(SystemExit):
        main(["rewire", "vit_nano"])
    ((backbone, (frames, mask)),) = compared
    assert frames.shape == (1, 3, 1, 32, 32)
    assert mask.all()
    assert any(isinstance(module, RewiredStage) for module in backbone.modules())
    capsys.readouterr()
