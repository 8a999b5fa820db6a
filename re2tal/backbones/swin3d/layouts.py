"""What other code bases call the entries of a Video Swin, given that ours are the original release's.

    original     layers.i.blocks.j.{norm1,attn,norm2,mlp.fc1,mlp.fc2}              layers.i.downsample   norm
    mmaction2    the same                                                          the same              norm<last>
    torchvision  features.2i.j.{norm1,attn,norm2,mlp.0,mlp.3}                      features.(2i+1)       norm
    OpenTAD      layers.i.blocks.j.inv_block.{Fm.norm1,Fm.attn,Gm.norm2,Gm.mlp.*}  layers.i.downsample   norm3

No tensor changes its shape on the way, but for those of a Swin for pictures (original layout), which are inflated:

    patch_embed.proj   (C, 3, 4, 4) -> (C, 3, 2, 4, 4)    repeated over the frames of a patch, divided by their number
    tables of bias     (rows, heads) -> (times, heads)    repeated over the distances in time

So a clip that stands still gives what its picture gave (Liu et al., CVPR 2022, section 3.3). Classification heads
(`head`, `cls_head`), the constant `relative_position_index`, and mmaction2's norms of earlier stages (used where it
returns those stages) are not ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from re2tal.backbones.weights import PAPERS_WIRING, KeyLayout, each

NOT_OURS = r"(cls_)?head\.|.*\.relative_position_index$"


def _numbered_norm(keys: Iterable[str]) -> str:
    """The highest of `norm0.`, `norm1.` ...: the network's own norm; "norm." where there is none."""
    numbers = [int(found[1]) for found in (re.match(r"norm(\d+)\.", key) for key in keys) if found]
    return f"norm{max(numbers)}." if numbers else "norm."


def _from_mmaction(keys: Collection[str]) -> dict[str, str]:
    own = _numbered_norm(keys)
    earlier = [key for key in keys if re.match(r"norm\d+\.", key) and not key.startswith(own)]
    kept = [key for key in keys if key not in earlier and not re.match(NOT_OURS, key)]
    return {key: "norm." + key.removeprefix(own) if key.startswith(own) else key for key in kept}


def _to_mmaction(keys: Collection[str]) -> dict[str, str]:
    last = max(int(key.split(".")[1]) for key in keys if key.startswith("layers."))
    return {key: re.sub(r"^norm\.", f"norm{last}.", key) for key in keys}


def _from_torchvision(key: str) -> str:
    key = re.sub(r"\.mlp\.0\.", ".mlp.fc1.", re.sub(r"\.mlp\.3\.", ".mlp.fc2.", key))
    if found := re.match(r"features\.(\d+)\.(.+)", key):
        stage, merging = divmod(int(found[1]), 2)
        return f"layers.{stage}.{'downsample' if merging else 'blocks'}.{found[2]}"
    return key


def _to_torchvision(key: str) -> str:
    key = key.replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.3.")
    if found := re.match(r"layers\.(\d+)\.(blocks|downsample)\.(.+)", key):
        return f"features.{2 * int(found[1]) + (found[2] == 'downsample')}.{found[3]}"
    return key


def _from_opentad(keys: Collection[str]) -> dict[str, str]:
    return {key: re.sub(r"\.inv_block\.[FG]m\.", ".", name) for key, name in _from_mmaction(keys).items()}


def _to_opentad(key: str) -> str:
    key = re.sub(r"(blocks\.\d+)\.(norm1|attn)\.", r"\1.inv_block.Fm.\2.", key)
    key = re.sub(r"(blocks\.\d+)\.(norm2|mlp)\.", r"\1.inv_block.Gm.\2.", key)
    return re.sub(r"^norm\.", "norm3.", key)


def _inflated(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Swin for pictures in the shapes of ours; those of video, and of other windows, as they are."""
    patches = given["patch_embed.proj.weight"]
    if patches.ndim == 5:
        return dict(given)
    frames = wanted["patch_embed.proj.weight"].shape[2]
    inflated = {"patch_embed.proj.weight": patches[:, :, None].expand(-1, -1, frames, -1, -1) / frames}
    for name, table in given.items():
        if name.endswith("relative_position_bias_table") and name in wanted:
            times, left = divmod(len(wanted[name]), len(table))
            if left == 0:
                inflated[name] = table.repeat(times, 1)
    return {**given, **inflated}


KEY_LAYOUTS = (
    KeyLayout(
        "OpenTAD Re2Swin",
        anchor=r"layers\.0\.blocks\.0\.inv_block\.Fm\.attn\.qkv\.weight",
        to_ours=_from_opentad,
        from_ours=each(_to_opentad),
        wiring=PAPERS_WIRING,
    ),
    KeyLayout(
        "torchvision",
        anchor=r"features\.0\.0\.attn\.qkv\.weight",
        to_ours=each(_from_torchvision, without=NOT_OURS),
        from_ours=each(_to_torchvision),
    ),
    # Its own norm is numbered; those of blocks follow the number of a block.
    KeyLayout(
        "mmaction2",
        anchor=r"(?<!\d\.)norm\d\.weight",
        to_ours=_from_mmaction,
        from_ours=_to_mmaction,
    ),
    KeyLayout(
        "original",
        anchor=r"layers\.0\.blocks\.0\.attn\.qkv\.weight",
        # A Swin for pictures keeps the masks of its shifted windows.
        to_ours=each(without=NOT_OURS + r"|.*\.attn_mask$"),
        reshape=_inflated,
    ),
)
