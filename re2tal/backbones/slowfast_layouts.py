"""What other code bases call the entries of a SlowFast network, given that ours are mmaction2's.

    mmaction2    slow_path.layer1.0.conv1.conv             slow_path.layer1.1.conv1.conv
    OpenTAD      slow_path.layer1.blocks.0.Fm.conv1.conv   slow_path.layer1.blocks.1.inv_block.Fm.conv1.conv

The downsampling of OpenTAD's first blocks stands beside `Fm`: `slow_path.layer1.blocks.0.downsample.conv`.
Classification heads (`cls_head`) are not ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from re2tal.backbones.weights import KeyLayout


def _from_mmaction(keys: Collection[str]) -> dict[str, str]:
    return {key: key for key in keys if not key.startswith("cls_head.")}


def _to_mmaction(keys: Collection[str]) -> dict[str, str]:
    return {key: key for key in keys}


def _from_opentad(keys: Collection[str]) -> dict[str, str]:
    renamed = {key: re.sub(r"(layer\d+)\.blocks\.(\d+)\.(inv_block\.)?(Fm\.)?", r"\1.\2.", key) for key in keys}
    return {key: name for key, name in renamed.items() if not key.startswith("cls_head.")}


def _to_opentad(keys: Collection[str]) -> dict[str, str]:
    return {key: re.sub(r"(layer\d+)\.(\d+)\.(.+)", _wrapped, key) for key in keys}


def _wrapped(found: re.Match[str]) -> str:
    layer, index, rest = found.groups()
    inner = f"inv_block.Fm.{rest}" if int(index) else rest if rest.startswith("downsample.") else f"Fm.{rest}"
    return f"{layer}.blocks.{index}.{inner}"


KEY_LAYOUTS = (
    KeyLayout(
        "OpenTAD Re2SlowFast",
        anchor=r"slow_path\.layer1\.blocks\.0\.Fm\.conv1\.conv\.weight",
        to_ours=_from_opentad,
        from_ours=_to_opentad,
    ),
    KeyLayout(
        "mmaction2",
        anchor=r"slow_path\.layer1\.0\.conv1\.conv\.weight",
        to_ours=_from_mmaction,
        from_ours=_to_mmaction,
    ),
)
