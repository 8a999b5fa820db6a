"""What the original VideoMAE release calls the entries of our VideoMAE, which has the names of transformers.

    original (and mmaction2)                    ours, below encoder.model
    blocks.i.attn.{qkv.weight,q_bias,v_bias}    videomae.encoder.layer.i.attention.attention.{query,key,value}
    blocks.i.{norm1,attn.proj}                  ...layernorm_before, attention.output.dense
    blocks.i.{norm2,mlp.fc1,mlp.fc2}            ...layernorm_after, intermediate.dense, output.dense
    norm (pre-trained) or fc_norm (fine-tuned)  videomae.layernorm or fc_norm

Pre-training checkpoints hold all of this under `encoder.`, next to a decoder and a `head`, which we ignore.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from re2tal.backbones.weights import KeyLayout, each

# Module names, theirs to ours; # stands for the number of the block.
MODULES = {
    "patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
    "blocks.#.norm1": "videomae.encoder.layer.#.layernorm_before",
    "blocks.#.attn.q": "videomae.encoder.layer.#.attention.attention.query",
    "blocks.#.attn.k": "videomae.encoder.layer.#.attention.attention.key",
    "blocks.#.attn.v": "videomae.encoder.layer.#.attention.attention.value",
    "blocks.#.attn.proj": "videomae.encoder.layer.#.attention.output.dense",
    "blocks.#.norm2": "videomae.encoder.layer.#.layernorm_after",
    "blocks.#.mlp.fc1": "videomae.encoder.layer.#.intermediate.dense",
    "blocks.#.mlp.fc2": "videomae.encoder.layer.#.output.dense",
    "norm": "videomae.layernorm",
    "fc_norm": "fc_norm",
}
THEIRS = {ours: theirs for theirs, ours in MODULES.items()}
PREFIX = "encoder.model."


def ends_in_token_norm(keys: Iterable[str]) -> bool:
    """Whether these entries, theirs or ours, hold the norm over tokens that pre-trained checkpoints end in."""
    return any(re.fullmatch(r"(.*\.)?(layer)?norm\.weight", key) for key in keys)


def _renamed(key: str, modules: Mapping[str, str]) -> str:
    module, _, entry = key.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    index = number[1] if number else "#"
    general = module.replace(f".{index}.", ".#.")
    return f"{modules[general].replace('#', index)}.{entry}" if general in modules else key


def _unpack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".attn.qkv.weight"):
            name = key.removesuffix("qkv.weight")
            parts |= {f"{name}{part}.weight": third for part, third in zip("qkv", value.chunk(3), strict=True)}
        else:
            parts[re.sub(r"\.attn\.([qv])_bias$", r".attn.\1.bias", key)] = value
    return parts


def _pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    fused: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".attn.q.weight"):
            name = key.removesuffix("q.weight")
            fused[f"{name}qkv.weight"] = torch.cat([state[f"{name}{part}.weight"] for part in "qkv"])
        elif not key.endswith((".attn.k.weight", ".attn.v.weight")):
            fused[re.sub(r"\.attn\.([qv])\.bias$", r".attn.\1_bias", key)] = value
    return fused


ORIGINAL = KeyLayout(
    "original VideoMAE",
    anchor=r"(?<!decoder\.)blocks\.0\.attn\.qkv\.weight",
    to_ours=each(lambda key: PREFIX + _renamed(key, MODULES), without=r"head\.|pos_embed$"),
    from_ours=each(lambda key: _renamed(key.removeprefix(PREFIX), THEIRS)),
    unpack=_unpack,
    pack=_pack,
)
