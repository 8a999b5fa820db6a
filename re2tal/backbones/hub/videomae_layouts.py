"""What other code bases call the entries of our VideoMAE, which has the names of transformers.

    original                                    ours, below encoder.model
    blocks.i.attn.{qkv.weight,q_bias,v_bias}    videomae.encoder.layer.i.attention.attention.{query,key,value}
    blocks.i.{norm1,attn.proj}                  ...layernorm_before, attention.output.dense
    blocks.i.{norm2,mlp.fc1,mlp.fc2}            ...layernorm_after, intermediate.dense, output.dense
    norm (pre-trained) or fc_norm (fine-tuned)  videomae.layernorm or fc_norm

mmaction2, and with it OpenTAD's AdaTAD, differs in four names, and holds two things more:

    patch_embed.projection, blocks.i.mlp.layers.0.0, blocks.i.mlp.layers.1    original: patch_embed.proj, fc1, fc2
    pos_embed                                   videomae.embeddings.position_embeddings
    blocks.i.adapter.*                          videomae.encoder.layer.i.adapter.*

A layer scale (`gamma_1`, `gamma_2`) becomes part of the linear layer before it, which computes the same. Files without
`q_bias` and `v_bias` leave both at zero. The original has no table of positions: ours is the sinusoid that it draws.

Pre-training checkpoints hold all of this under `encoder.`, next to a decoder and a `head`, which we ignore.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from re2tal.backbones.weights import KeyLayout, each

ADAPTER_PARTS = (".down_proj", ".dwconv", ".conv", ".up_proj")
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
    **{f"blocks.#.adapter{part}": f"videomae.encoder.layer.#.adapter{part}" for part in ("", *ADAPTER_PARTS)},
}
THEIRS = {ours: theirs for theirs, ours in MODULES.items()}
PREFIX = "encoder.model."
POSITIONS = "videomae.embeddings.position_embeddings"


def ends_in_token_norm(keys: Iterable[str]) -> bool:
    """Whether these entries, theirs or ours, hold the norm over tokens that pre-trained checkpoints end in.

    A detector's localizer has norms too, and a decoder may, so only one beside the network's own blocks counts.
    """
    keys = set(keys)
    blocks = re.compile(r"((?:.*\.)?)(?:blocks\.0\.attn\.qkv|encoder\.layer\.0\.layernorm_before)\.weight")
    beside = [found[1] for found in map(blocks.fullmatch, keys) if found and not found[1].endswith("decoder.")]
    return any({f"{prefix}norm.weight", f"{prefix}layernorm.weight"} & keys for prefix in beside)


def _renamed(key: str, modules: Mapping[str, str]) -> str:
    if key in (tables := {"pos_embed": POSITIONS, POSITIONS: "pos_embed"}):
        return tables[key]
    module, _, entry = key.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    index = number[1] if number else "#"
    general = module.replace(f".{index}.", ".#.")
    return f"{modules[general].replace('#', index)}.{entry}" if general in modules else key


def _unpack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for key, value in state.items():
        block, _, entry = key.rpartition(".attn.")
        if entry == "qkv.weight":
            thirds = dict(zip("qkv", value.chunk(3), strict=True))
            parts |= {f"{block}.attn.{part}.weight": third for part, third in thirds.items()}
            biases = {part: state.get(f"{block}.attn.{part}_bias") for part in "qv"}
            for part, bias in biases.items():
                zeros = thirds[part].new_zeros(len(thirds[part]))
                parts[f"{block}.attn.{part}.bias"] = zeros if bias is None else bias
        elif entry not in ("q_bias", "v_bias") and not re.search(r"\.gamma_[12]$", key):
            scale = _scale_behind(key, state)
            parts[key] = value if scale is None else value * scale
    return parts


def _scale_behind(key: str, state: Mapping[str, Tensor]) -> Tensor | None:
    """The layer scale that follows the linear layer of this entry, in the shape that scales its outputs."""
    found = re.fullmatch(r"(.*blocks\.\d+\.)(?:(attn\.proj)|mlp\.(?:fc2|layers\.1))\.(weight|bias)", key)
    scale = state.get(f"{found[1]}gamma_{1 if found[2] else 2}") if found else None
    if found is None or scale is None:
        return None
    return scale[:, None] if found[3] == "weight" else scale


def _pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    fused: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".attn.q.weight"):
            name = key.removesuffix("q.weight")
            fused[f"{name}qkv.weight"] = torch.cat([state[f"{name}{part}.weight"] for part in "qkv"])
        elif not key.endswith((".attn.k.weight", ".attn.v.weight")):
            fused[re.sub(r"\.attn\.([qv])\.bias$", r".attn.\1_bias", key)] = value
    return fused


def _from_mmaction(key: str) -> str:
    key = key.replace(".mlp.layers.0.0.", ".mlp.fc1.").replace(".mlp.layers.1.", ".mlp.fc2.")
    return PREFIX + _renamed(key.replace("patch_embed.projection.", "patch_embed.proj."), MODULES)


def _to_mmaction(key: str) -> str:
    key = _renamed(key.removeprefix(PREFIX), THEIRS).replace("patch_embed.proj.", "patch_embed.projection.")
    return key.replace(".mlp.fc1.", ".mlp.layers.0.0.").replace(".mlp.fc2.", ".mlp.layers.1.")


# Files from before there was an adapter, or from code that draws its table of positions, are complete without them.
BUILT = (re.escape(PREFIX + POSITIONS), r".*\.encoder\.layer\.\d+\.adapter\..*")

MMACTION = KeyLayout(
    "mmaction2 VideoMAE",
    anchor=r"blocks\.0\.mlp\.layers\.0\.0\.weight",
    to_ours=each(_from_mmaction, without=r"(cls_)?head\."),
    from_ours=each(_to_mmaction),
    unpack=_unpack,
    pack=_pack,
    optional=BUILT,
)

ORIGINAL = KeyLayout(
    "original VideoMAE",
    anchor=r"(?<!decoder\.)blocks\.0\.attn\.qkv\.weight",
    to_ours=each(lambda key: PREFIX + _renamed(key, MODULES), without=r"head\."),
    from_ours=each(
        lambda key: None if key == PREFIX + POSITIONS else _renamed(key.removeprefix(PREFIX), THEIRS),
    ),
    unpack=_unpack,
    pack=_pack,
    optional=BUILT,
)
