"""Weights under the names of the public implementations, both ways.

OpenTAD's checkpoints and those of the original ActionFormer hold the same layers as ours under other names, and some
vectors as (1, C, 1). Build an ActionFormer with the `variant` that the weights were trained with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from re2tal.localizers.losses import RunningCount
from re2tal.localizers.pyramid.actionformer import Variant
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.localizers.vsgn.localizer import VSGN


@dataclass(frozen=True)
class NameMap:
    """How a public implementation names what ours names otherwise."""

    renames: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
    """(pattern, replacement), applied in order to our names"""
    prefixes: tuple[str, ...]
    """of the localizer's entries among those of a whole detector"""
    # (?!) matches nothing.
    columns: str = "(?!)"
    """pattern of our names of vectors of C numbers that it stores as (1, C, 1)"""
    absent: str = "(?!)"
    """pattern of our names of what it does not store"""


def _in_tower(name: str, found: re.Match[str]) -> str:
    """Layer `found[2]` of the tower's part `found[1]`, where the parts are one sequence of three layers each."""
    return f"head_dec.{name}.{3 * int(found[1]) + int(found[2])}."


_BLOCK = (
    (r"\.attention_norm\.", ".ln1."),
    (r"\.mlp_norm\.", ".ln2."),
    (r"\.attention\.(query|key|value)\.conv\.", r".attn.\1_conv.conv."),
    (r"\.attention\.(query|key|value)\.norm\.", r".attn.\1_norm."),
    (r"\.attention\.(query|key|value)\.linear\.", r".attn.\1."),
    (r"\.attention\.output\.", ".attn.proj."),
    (r"\.attention_path\.", ".drop_path_attn."),
    (r"\.mlp_path\.", ".drop_path_mlp."),
    (r"^level_norms\.", "neck.fpn_norms."),
)
_OPENTAD_PYRAMID = NameMap(
    renames=(
        (r"^encoder\.embedding\.", "projection.embed."),
        (r"^encoder\.(stem|branch)\.", r"projection.\1."),
        (r"^classifier\.convs\.", "rpn_head.cls_convs."),
        (r"^classifier\.output\.", "rpn_head.cls_head."),
        (r"^regressor\.convs\.", "rpn_head.reg_convs."),
        (r"^regressor\.output\.", "rpn_head.reg_head."),
        (r"^regressor\.scales\.", "rpn_head.scale."),
        (r"^positives\.units$", "rpn_head.loss_normalizer"),
        *_BLOCK,
    ),
    prefixes=("projection.", "neck.", "rpn_head."),
    columns=r"_path\.scale$",
)
_MAPS: dict[tuple[str, str], NameMap] = {
    ("actionformer", "opentad"): _OPENTAD_PYRAMID,
    ("temporalmaxer", "opentad"): _OPENTAD_PYRAMID,
    ("tridet", "opentad"): NameMap(
        renames=(
            # Before those of all pyramids, which would take "mlp_norm" and the regressor's own convolutions for
            # ActionFormer's.
            (r"^regressor\.(start|end)s\.convs\.", r"rpn_head.cls_\1_convs."),
            (r"^regressor\.(start|end)s\.output\.", r"rpn_head.cls_\1_head."),
            (r"\.pool\.", ".downsample."),
            (r"(stem|branch)\.(\d+)\.norm\.", r"\1.\2.ln."),
            (r"\.mlp_norm\.", ".gn."),
            (r"\.instant\.", ".fc."),
            (r"\.overall\.", ".global_fc."),
            (r"\.near\.", ".convw."),
            (r"\.wide\.", ".convkw."),
            (r"\.gate\.", ".psi."),
            (r"\.path\.", ".drop_path_out."),
            *_OPENTAD_PYRAMID.renames,
        ),
        prefixes=_OPENTAD_PYRAMID.prefixes,
        columns=r"path\.scale$",
    ),
    ("actionformer", "original"): NameMap(
        renames=(
            (r"^encoder\.embedding\.(\d+)\.conv\.", r"backbone.embd.\1.conv."),
            (r"^encoder\.embedding\.(\d+)\.norm\.", r"backbone.embd_norm.\1."),
            (r"^encoder\.(stem|branch)\.", r"backbone.\1."),
            (r"^classifier\.convs\.(\d+)\.conv\.", r"cls_head.head.\1.conv."),
            (r"^classifier\.convs\.(\d+)\.norm\.", r"cls_head.norm.\1."),
            (r"^classifier\.output\.", "cls_head.cls_head.conv."),
            (r"^regressor\.convs\.(\d+)\.conv\.", r"reg_head.head.\1.conv."),
            (r"^regressor\.convs\.(\d+)\.norm\.", r"reg_head.norm.\1."),
            (r"^regressor\.output\.", "reg_head.offset_head.conv."),
            (r"^regressor\.scales\.", "reg_head.scale."),
            *_BLOCK,
        ),
        prefixes=("backbone.", "neck.", "cls_head.", "reg_head."),
        columns=r"_path\.scale$|norms?\.(\d+\.)?(weight|bias)$",
        absent=r"^positives\.units$",
    ),
    ("vsgn", "opentad"): NameMap(
        renames=(
            (r"^encoder\.stem\.", "projection.stem_convs."),
            (r"^encoder\.levels\.(\d+)\.graph\.linear\.", r"projection.pyramid_convs.\1.nconv1.mlp."),
            (r"^encoder\.levels\.(\d+)\.temporal\.", r"projection.pyramid_convs.\1.tconv1."),
            (r"^encoder\.levels\.", "projection.pyramid_convs."),
            (r"^decoder\.top\.", "neck.levels_transit."),
            (r"^decoder\.laterals\.", "neck.levels_enc."),
            (r"^decoder\.ups\.", "neck.levels_dec."),
            (r"^decoder\.fuses\.", "neck.levels_fuse."),
            (r"^classifier\.tower\.", "rpn_head.cls_tower."),
            (r"^classifier\.output\.", "rpn_head.cls_head."),
            (r"^regressor\.tower\.", "rpn_head.reg_tower."),
            (r"^regressor\.output\.", "rpn_head.reg_head."),
            (r"^boundaries\.(start|end)\.", r"roi_head.\1_conv."),
            (r"^evaluation\.branches\.(\d+)\.0\.", r"rpn_head.tem_head.tem.\1.0.conv."),
            (r"^evaluation\.branches\.(\d+)\.2\.", r"rpn_head.tem_head.tem.\1.1.conv."),
        ),
        prefixes=("projection.", "neck.", "rpn_head.", "roi_head."),
        absent=r"^positives\.",
    ),
    ("vsgn", "original"): NameMap(
        renames=(
            (r"^encoder\.stem\.conv\.", "xGPN.conv0.0."),
            (r"^encoder\.levels\.(\d+)\.graph\.linear\.", r"xGPN.levels_enc.\1.nconv1.mlp."),
            (r"^encoder\.levels\.(\d+)\.temporal\.", r"xGPN.levels_enc.\1.tconv1."),
            (r"^encoder\.levels\.(\d+)\.conv\.", r"xGPN.levels_enc.\1.0."),
            (r"^decoder\.top\.", "xGPN.levels1.0."),
            (r"^decoder\.laterals\.", "xGPN.levels2."),
            (r"^decoder\.fuses\.(\d+)\.", lambda found: f"xGPN.levels1.{int(found[1]) + 1}."),
            (r"^decoder\.ups\.", "xGPN.levels_dec."),
            (r"^classifier\.tower\.(\d+)\.(\d)\.", lambda found: _in_tower("cls_tower", found)),
            (r"^regressor\.tower\.(\d+)\.(\d)\.", lambda found: _in_tower("bbox_tower", found)),
            (r"^classifier\.output\.", "head_dec.cls_logits."),
            (r"^regressor\.output\.", "head_dec.bbox_pred."),
            (r"^boundaries\.(start|end)\.", r"bd_adjust.\1_conv."),
            (r"^evaluation\.branches\.0\.", "head_startness."),
            (r"^evaluation\.branches\.1\.", "head_endness."),
            (r"^evaluation\.branches\.2\.", "head_actionness."),
        ),
        prefixes=("xGPN.", "head_dec.", "bd_adjust.", "head_actionness.", "head_startness.", "head_endness."),
        absent=r"^positives\.",
    ),
}


def public_name(name: str, *, localizer: PyramidLocalizer | VSGN, layout: Variant) -> str:
    """The name that `layout` has for the parameter or buffer that the localizer's `state_dict()` calls `name`."""
    for pattern, replacement in _name_map(localizer, layout).renames:
        name = re.sub(pattern, replacement, name)
    return name


def public_prefixes(localizer: PyramidLocalizer | VSGN, layout: Variant) -> tuple[str, ...]:
    """What the names of the localizer's entries begin with in `layout`."""
    return _name_map(localizer, layout).prefixes


def import_weights(
    state: Mapping[str, Tensor], *, localizer: PyramidLocalizer | VSGN, layout: Variant
) -> dict[str, Tensor]:
    """A public checkpoint as a state dict for `localizer.load_state_dict`.

    Tensors outside the localizer, such as a video backbone's, are passed over; running counts of positives that the
    checkpoint does not hold stay the localizer's own, and scales of branches, which a model that was built without drop
    path has none of, are 1. Raises ValueError for weights that are missing, left over or of another size.
    """
    own = localizer.state_dict()
    name_map = _name_map(localizer, layout)
    # What the checkpoint does not hold keeps this localizer's value: `own` is filled in and returned.
    stored = [name for name in own if not re.search(name_map.absent, name)]
    names = {public_name(name, localizer=localizer, layout=layout): name for name in stored}
    found = {name for name in state if name.startswith(name_map.prefixes)}
    scales = {public: name for public, name in names.items() if re.search(r"path\.scale$", name)}
    if not scales.keys() & found:
        own |= {name: torch.ones_like(own[name]) for name in scales.values()}
        names = {public: name for public, name in names.items() if public not in scales}
    missing, left_over = sorted(names.keys() - found), sorted(found - names.keys())
    if missing or left_over:
        raise ValueError(
            f"these are not the {layout} weights of this {localizer.config.name}: missing {_some(missing)}, left "
            f"over {_some(left_over)}; check `layout`, and the config's levels, blocks and convolutions"
        )
    for public, name in names.items():
        if _sides(state[public]) != _sides(own[name]):
            raise ValueError(
                f"{public} is {tuple(state[public].shape)}, {name} is {tuple(own[name].shape)}; check the config's "
                "channels, `in_channels` and the number of classes"
            )
        # Others store the running count as a float.
        tensor = state[public] if name != _COUNT else (state[public].double() * RunningCount.UNITS).round()
        own[name] = tensor.reshape(own[name].shape).to(own[name].dtype)
    return own


def export_weights(localizer: PyramidLocalizer | VSGN, *, layout: Variant) -> dict[str, Tensor]:
    """The localizer's weights under the names and shapes of `layout`: the inverse of `import_weights`."""
    name_map, public = _name_map(localizer, layout), {}
    for name, tensor in localizer.state_dict().items():
        if re.search(name_map.absent, name):
            continue
        if name == _COUNT:
            tensor = tensor.double().div(RunningCount.UNITS).float()
        elif re.search(name_map.columns, name):
            tensor = tensor[None, :, None]
        elif re.search(_SCALAR, name):
            tensor = tensor.squeeze(0)
        public[public_name(name, localizer=localizer, layout=layout)] = tensor
    return public


def _sides(tensor: Tensor) -> list[int]:
    """Its shape without axes of length 1: those are all in which ours and theirs may differ."""
    return [size for size in tensor.shape if size != 1]


_COUNT = "positives.units"
# Public implementations store these as (), ours as (1,).
_SCALAR = r"^regressor\.scales\."


def _name_map(localizer: PyramidLocalizer | VSGN, layout: Variant) -> NameMap:
    try:
        return _MAPS[localizer.config.name, layout]
    except KeyError:
        known = [layout for name, layout in _MAPS if name == localizer.config.name]
        raise ValueError(f"unknown layout {layout!r} for {localizer.config.name}; known: {known}") from None


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"
