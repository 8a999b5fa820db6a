"""The layers of torch.nn that are residual blocks: nn.TransformerEncoderLayer, where its norms come first.

    x = x + attention(norm1(x));  x = x + mlp(norm2(x))

With norms behind the sums (post-norm, its default) nothing is added to the state itself: only whole blocks can be
rewired, RewiringConfig(unit="block").
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.rewire.branches import Branch, residual_branches, why_not_residual
from re2tal.rewire.cuts import by_samples


def _attend(
    layer: nn.TransformerEncoderLayer,
    x: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    padding = F._canonical_mask(
        src_key_padding_mask, "src_key_padding_mask", F._none_or_dtype(src_mask), "src_mask", x.dtype
    )
    mask = F._canonical_mask(src_mask, "src_mask", None, "", x.dtype, check_other=False)
    return layer._sa_block(layer.norm1(x), mask, padding, is_causal=is_causal)


def _transform(layer: nn.TransformerEncoderLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return layer._ff_block(layer.norm2(x))


@residual_branches.register
def _(layer: nn.TransformerEncoderLayer) -> tuple[Branch, ...]:
    if not layer.norm_first:
        return ()
    kinks = layer.activation_relu_or_gelu == 1
    inner = 1 + 2 * layer.linear1.out_features / layer.linear1.in_features
    cut = by_samples(inner) if getattr(layer.self_attn, "batch_first", False) else None
    return Branch("attention", _attend, kinks=kinks), Branch("mlp", _transform, kinks=kinks, cut=cut)


@why_not_residual.register
def _(layer: nn.TransformerEncoderLayer) -> str:
    return "its norms come after its sums (norm_first is not set)"
