"""A sample of `parity_matrix.py`: every ZeRO stage trains what plain torch in float64 trains."""

from __future__ import annotations

import re
from dataclasses import astuple

import pytest
from distributed.parity_matrix import Cell, cells, compare

SAMPLE = [
    Cell(0, "none", 2, "fp32", "rewired"),
    Cell(1, "optimizer", 1, "fp32", "plain"),
    Cell(2, "none", 1, "bf16", "rewired"),
    Cell(3, "optimizer, parameters", 2, "fp32", "rewired"),
    Cell(3, "none", 1, "bf16", "plain"),
    Cell(0, "none", 1, "bf16", "plain"),
    Cell(2, "optimizer, parameters", 1, "fp32", "plain"),
]
REFUSED = {
    SAMPLE[-2]: "ZeRO stage 0 keeps no float32 masters .* use stage 1",
    SAMPLE[-1]: "offload_param needs stage 3, the file has stage 2; remove one",
}


@pytest.fixture(scope="module")
def rows() -> dict[Cell, dict]:
    return dict(zip(SAMPLE, compare(SAMPLE), strict=True))


@pytest.mark.parametrize("cell", [cell for cell in SAMPLE if cell not in REFUSED], ids=lambda cell: str(astuple(cell)))
def test_losses_and_weights_are_those_of_plain_torch(cell, rows):
    assert rows[cell]["held"], rows[cell]


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: str(astuple(cell)))
def test_what_cannot_be_is_refused_in_words(cell, rows):
    assert re.search(REFUSED[cell], rows[cell]["refused"])


@pytest.mark.slow
def test_every_cell_holds_or_is_refused():
    for row in compare(list(cells())):
        assert row.get("held", "refused" in row), row
