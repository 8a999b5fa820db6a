"""A sample of the table of architectures: `benchmarks/architectures.py` makes all of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def load() -> ModuleType:
    sys.path.insert(0, BENCHMARKS)
    try:
        return importlib.import_module("architectures")
    finally:
        sys.path.remove(BENCHMARKS)


architectures = load()
IN_BLOCKS = {"ResNetModel", "BertModel", "nn.TransformerEncoder(post-norm)"}


@pytest.fixture(autouse=True)
def fast_path():
    """The benchmark turns it off for its process."""
    before = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", architectures.QUICK)
def test_an_architecture_is_rewired_exactly(name) -> None:
    (row,) = (row for row in architectures.ROWS if row.name == name)
    result = architectures.examine(row)
    assert result.status == "rewired", result.reason
    assert result.unit == ("block" if name in IN_BLOCKS else "branch")
    assert 0.0 < result.params <= 1.0
    assert 0.0 < result.flops <= 1.0


def test_a_network_that_became_another_one_is_told(monkeypatch) -> None:
    (row,) = (row for row in architectures.ROWS if row.name == "ViTModel")
    monkeypatch.setattr(architectures, "_call", lambda model, example: torch.randn(3, requires_grad=True))
    monkeypatch.setattr(architectures, "_share_of_flops", lambda *args: 1.0)
    assert architectures.examine(row).status == "different"


def test_the_table_has_sixty_architectures() -> None:
    names = [row.name for row in architectures.ROWS]
    assert len(set(names)) == len(names) >= 60
