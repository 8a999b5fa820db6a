"""ActionFormer weights under the names of the public implementations, both ways.

OpenTAD's checkpoints and those of the original ActionFormer hold the same layers under other names, and some vectors
as (1, C, 1). Build the localizer with the `variant` that the weights were trained with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from re2tal.localizers.actionformer import ActionFormer, Variant

_COUNT = "positives.units"

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
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "opentad": (
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
    "original": (
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
}
_PREFIXES = {
    "opentad": ("projection.", "neck.", "rpn_head."),
    "original": ("backbone.", "neck.", "cls_head.", "reg_head."),
}
# Own names of the vectors of C numbers that a layout stores as (1, C, 1).
_COLUMNS = {"opentad": r"_path\.scale$", "original": r"_path\.scale$|norms?\.(\d+\.)?(weight|bias)$"}


def public_name(name: str, layout: Variant) -> str:
    """The name that `layout` has for the parameter or buffer that `ActionFormer.state_dict()` calls `name`."""
    for pattern, replacement in _RENAMES[layout]:
        name = re.sub(pattern, replacement, name)
    return name


def import_weights(state: Mapping[str, Tensor], *, localizer: ActionFormer, layout: Variant) -> dict[str, Tensor]:
    """A public checkpoint as a state dict for `localizer.load_state_dict`.

    Tensors outside the localizer, such as a video backbone's, are passed over. The original keeps no running count of
    positives: the localizer's own stays. Raises ValueError for weights that are missing, left over or of another size.
    """
    own = localizer.state_dict()
    names = {public_name(name, layout): name for name in own if name != _COUNT or layout == "opentad"}
    found = {name for name in state if name.startswith(_PREFIXES[layout])}
    missing, left_over = sorted(names.keys() - found), sorted(found - names.keys())
    if missing or left_over:
        raise ValueError(
            f"these are not the {layout} weights of this ActionFormer: missing {_some(missing)}, left over "
            f"{_some(left_over)}; check `layout`, and the config's levels, blocks and convolutions"
        )
    for public, name in names.items():
        if state[public].numel() != own[name].numel():
            raise ValueError(
                f"{public} is {tuple(state[public].shape)}, {name} is {tuple(own[name].shape)}; check the config's "
                "channels, `in_channels` and the number of classes"
            )
        tensor = state[public]
        if name == _COUNT:
            tensor = (tensor.double() * localizer.positives.UNITS).round()
        own[name] = tensor.reshape(own[name].shape).to(own[name].dtype)
    return own


def export_weights(localizer: ActionFormer, *, layout: Variant) -> dict[str, Tensor]:
    """The localizer's weights under the names and shapes of `layout`: the inverse of `import_weights`."""
    public = {}
    for name, tensor in localizer.state_dict().items():
        if name == _COUNT:
            if layout == "original":
                continue
            tensor = localizer.positives.value()
        if re.search(_COLUMNS[layout], name):
            tensor = tensor[None, :, None]
        elif name.startswith("regressor.scales."):
            tensor = tensor[0]
        public[public_name(name, layout)] = tensor
    return public


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"
