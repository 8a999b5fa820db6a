"""What the V-JEPA 2 release calls the entries of our V-JEPA 2, which has the names of transformers.

    original, below module.backbone             ours, below encoder.model.encoder
    patch_embed.proj                            embeddings.patch_embeddings.proj
    blocks.i.attn.qkv (query, key, value)       layer.i.attention.{query,key,value}
    blocks.i.{norm1,attn.proj,norm2,mlp.fc1,mlp.fc2}    layer.i.{norm1,attention.proj,norm2,mlp.fc1,mlp.fc2}
    norm                                        layernorm

Its files hold the encoder twice, as trained and as a moving average, and the predictor. The first V-JEPA has a table of
positions instead of rotary ones: its `pos_embed` is unexpected here, so such a file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from re2tal.backbones.weights import KeyLayout, each

PREFIX = "encoder.model.encoder."
RENAMES = (
    (r"^patch_embed\.", "embeddings.patch_embeddings."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.", r"layer.\1."),
    (r"\.attn\.", ".attention."),
)
BACK = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed."),
    (r"^layernorm\.", "norm."),
    (r"^layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.", ".attn."),
)
PARTS = ("query", "key", "value")


def _renamed(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in renames:
        key = re.sub(pattern, name, key)
    return key


def _unpack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            thirds = zip(PARTS, value.chunk(3), strict=True)
            parts |= {key.replace(".qkv.", f".{part}."): third for part, third in thirds}
        else:
            parts[key] = value
    return parts


def _pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    fused: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.query." in key:
            whole = [state[key.replace(".query.", f".{part}.")] for part in PARTS]
            fused[key.replace(".query.", ".qkv.")] = torch.cat(whole)
        elif not re.search(r"\.attn\.(key|value)\.", key):
            fused[key] = value
    return fused


ORIGINAL = KeyLayout(
    "original V-JEPA 2",
    anchor=r"blocks\.0\.attn\.qkv\.weight",
    to_ours=each(lambda key: PREFIX + _renamed(key, RENAMES)),
    from_ours=each(lambda key: _renamed(key.removeprefix(PREFIX), BACK)),
    unpack=_unpack,
    pack=_pack,
)
