"""What other code bases call the entries of a SlowFast network, given that ours are mmaction2's.

    mmaction2    slow_path.layer1.0.conv1.conv             slow_path.layer1.1.conv1.conv
    OpenTAD      slow_path.layer1.blocks.0.Fm.conv1.conv   slow_path.layer1.blocks.1.inv_block.Fm.conv1.conv
    pytorchvideo blocks.1.multipathway_blocks.0.res_blocks.0.branch2.conv_a, its norm beside it: branch2.norm_a

The downsampling of OpenTAD's first blocks stands beside `Fm`: `slow_path.layer1.blocks.0.downsample.conv`.
Classification heads (`cls_head`, `blocks.6`) are not ours.
"""

from __future__ import annotations

import re

from re2tal.backbones.weights import PAPERS_WIRING, KeyLayout, each

HEAD = r"cls_head\."


def _from_opentad(key: str) -> str:
    return re.sub(r"(layer\d+)\.blocks\.(\d+)\.(inv_block\.)?(Fm\.)?", r"\1.\2.", key)


def _to_opentad(key: str) -> str:
    return re.sub(r"(layer\d+)\.(\d+)\.(.+)", _wrapped, key)


def _wrapped(found: re.Match[str]) -> str:
    layer, index, rest = found.groups()
    inner = f"inv_block.Fm.{rest}" if int(index) else rest if rest.startswith("downsample.") else f"Fm.{rest}"
    return f"{layer}.blocks.{index}.{inner}"


PYTORCHVIDEO = re.compile(
    r"blocks\.(?P<stage>\d)\.multipathway_(?:blocks\.(?P<pathway>[01])|fusion)\."
    r"(?:res_blocks\.(?P<block>\d+)\.branch[12][._])?(?P<kind>conv|norm)(?:_(?P<letter>[abc])|_fast_to_slow)?\.(?P<entry>\w+)"
)


def _from_pytorchvideo(key: str) -> str | None:
    if (found := PYTORCHVIDEO.fullmatch(key)) is None:
        return None
    stage, pathway, block, letter = found.group("stage", "pathway", "block", "letter")
    place = "conv1" if stage == "0" else f"layer{stage}"
    if pathway is None:
        place += "_lateral"
    elif block is not None:
        place += f".{block}." + ("downsample" if letter is None else f"conv{'abc'.index(letter) + 1}")
    kind = {"conv": "conv", "norm": "bn"}[found["kind"]]
    return f"{'fast' if pathway == '1' else 'slow'}_path.{place}.{kind}.{found['entry']}"


OURS = re.compile(
    r"(?P<speed>slow|fast)_path\.(?:conv1|layer(?P<stage>\d))(?P<lateral>_lateral)?"
    r"(?:\.(?P<block>\d+)\.(?:downsample|conv(?P<number>\d)))?\.(?P<kind>conv|bn)\.(?P<entry>\w+)"
)


def _to_pytorchvideo(key: str) -> str | None:
    if (found := OURS.fullmatch(key)) is None:
        return None
    stage, block, number = found.group("stage", "block", "number")
    kind = {"conv": "conv", "bn": "norm"}[found["kind"]]
    if found["lateral"]:
        inner = "multipathway_fusion." + ("conv_fast_to_slow" if kind == "conv" else kind)
    else:
        inner = f"multipathway_blocks.{('slow', 'fast').index(found['speed'])}."
        if block is not None:
            inner += f"res_blocks.{block}." + ("branch1_" if number is None else "branch2.")
        inner += kind + (f"_{'abc'[int(number) - 1]}" if number else "")
    return f"blocks.{stage or 0}.{inner}.{found['entry']}"


KEY_LAYOUTS = (
    KeyLayout(
        "OpenTAD Re2SlowFast",
        anchor=r"slow_path\.layer1\.blocks\.0\.Fm\.conv1\.conv\.weight",
        to_ours=each(_from_opentad, without=HEAD),
        from_ours=each(_to_opentad),
        wiring=PAPERS_WIRING,
    ),
    KeyLayout(
        "mmaction2",
        anchor=r"slow_path\.layer1\.0\.conv1\.conv\.weight",
        to_ours=each(without=HEAD),
    ),
    KeyLayout(
        "pytorchvideo",
        anchor=r"blocks\.1\.multipathway_blocks\.0\.res_blocks\.0\.branch2\.conv_a\.weight",
        to_ours=each(_from_pytorchvideo),
        from_ours=each(_to_pytorchvideo),
    ),
)
