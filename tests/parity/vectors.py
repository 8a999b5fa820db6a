"""Finds and reads reference vectors.

`$RE2TAL_PARITY_DIR`, else `../shared/parity` beside the repository, else `tests/parity/vectors/`.

Cases are found by file name and `configs.json`, so that another folder of the same layout, with other numbers and
configurations, runs unchanged.
"""

from __future__ import annotations

import json
import lzma
import os
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as tensors_from_bytes

REPOSITORY = Path(__file__).resolve().parents[2]


@cache
def vectors_dir() -> Path:
    """The folder that holds the vectors; an error if it was named and is not there."""
    named = os.environ.get("RE2TAL_PARITY_DIR")
    if named:
        if not (Path(named) / "configs.json").is_file():
            raise FileNotFoundError(f"RE2TAL_PARITY_DIR={named} has no configs.json")
        return Path(named)
    beside = REPOSITORY.parent / "shared" / "parity"
    return beside if (beside / "configs.json").is_file() else Path(__file__).parent / "vectors"


@dataclass(frozen=True)
class Case:
    """One reference case: `arrays` of NAME.npz, `state` of NAME.safetensors, `config` of configs.json."""

    name: str
    arrays: dict[str, np.ndarray]
    state: dict[str, torch.Tensor]
    config: dict[str, Any]

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def clips(self, prefix: str) -> range:
        """The clips for which there is an array called `prefix` and their number: 0, 1, ..."""
        return range(next(number for number in count() if f"{prefix}{number}" not in self.arrays))


def cases(prefix: str) -> list[str]:
    """Names of the cases whose NAME.npz starts with `prefix`, for `pytest.mark.parametrize`."""
    return sorted(path.stem for path in vectors_dir().glob(f"{prefix}*.npz"))


def load(name: str) -> Case:
    folder = vectors_dir()
    with np.load(folder / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    state = _state(folder / f"{name}.safetensors")
    config = json.loads((folder / "configs.json").read_text())
    return Case(name, arrays, state, config.get(name, {}))


def _state(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, plain or compressed beside it; none where the case has no weights."""
    compressed = path.with_name(path.name + ".xz")
    if path.is_file():
        return tensors_from_bytes(path.read_bytes())
    return tensors_from_bytes(lzma.decompress(compressed.read_bytes())) if compressed.is_file() else {}


def read_json(name: str) -> Any:
    return json.loads((vectors_dir() / name).read_text())
