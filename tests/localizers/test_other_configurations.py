"""Localizers of many shapes against loops written from the published descriptions, step by step and in float64.

The reference vectors have a few settings; these have other depths, windows, kernels, norms and lengths, clips of one
step, batches with padding, points that several actions want, and actions without length.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from re2tal.localizers import ActionFormerConfig, TemporalMaxerConfig, TriDetConfig, build_localizer
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.structures import Features

Outputs = tuple[Tensor, Tensor, Tensor]
"""Logits (P, K), offsets (P, 2) or (P, K, 2) and mask (P,) of one clip."""


class Weights:
    """Layers of a localizer by name, over one clip (T, C)."""

    def __init__(self, state: dict[str, Tensor], prefix: str = "") -> None:
        self.state, self.prefix = state, prefix

    def at(self, prefix: str) -> Weights:
        return Weights(self.state, f"{self.prefix}{prefix}.")

    def __call__(self, name: str) -> Tensor | None:
        return self.state.get(self.prefix + name)

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        spread = ((centred**2).mean(dim=1, keepdim=True) + eps).sqrt()
        return centred / spread * self(f"{name}.weight") + self(f"{name}.bias")

    def group_norm(self, x: Tensor, name: str, groups: int) -> Tensor:
        parts = x.reshape(len(x), groups, -1)
        centred = parts - parts.mean(dim=(0, 2), keepdim=True)
        spread = ((centred**2).mean(dim=(0, 2), keepdim=True) + 1e-5).sqrt()
        x, scale = (centred / spread).reshape(x.shape), self(f"{name}.weight")
        return x if scale is None else x * scale + self(f"{name}.bias")

    def conv(self, x: Tensor, name: str, *, stride: int = 1) -> Tensor:
        """One output step at a time; depthwise where each filter sees one channel only."""
        weight, bias = self(f"{name}.weight"), self(f"{name}.bias")
        around = weight.shape[2] // 2
        padded = F.pad(x, (0, 0, around, around))
        depthwise = weight.shape[1] == 1 and x.shape[1] > 1
        steps = []
        for step in range(0, len(x), stride):
            seen = padded[step : step + weight.shape[2]]
            steps.append((seen * weight[:, 0].T).sum(0) if depthwise else torch.einsum("kc,ock->o", seen, weight))
        return torch.stack(steps) + (0 if bias is None else bias)

    def embed(self, x: Tensor, mask: Tensor, *, eps: float, again: bool = True) -> Tensor:
        x = torch.relu(self.norm(self.conv(x, "conv") * mask[:, None], "norm", eps))
        return x * mask[:, None] if again else x

    def tower(self, x: Tensor, mask: Tensor, num_convs: int, **options: Any) -> Tensor:
        for number in range(num_convs):
            x = self.at(f"convs.{number}").embed(x, mask, **options)
        return self.conv(x, "output")


def pooled(x: Tensor) -> Tensor:
    """The largest of three steps around every second."""
    return torch.stack([x[max(0, step - 1) : step + 2].amax(dim=0) for step in range(0, len(x), 2)])


def positions(config: ActionFormerConfig | TriDetConfig, num_steps: int) -> Tensor:
    """Sine and cosine (T, C), stretched where the clip is longer than the table."""
    channel = np.arange(config.channels)
    angle = np.arange(config.max_num_steps)[:, None] / 10_000 ** (2 * (channel // 2) / config.channels)
    table = torch.tensor(np.where(channel % 2 == 0, np.sin(angle), np.cos(angle)) / config.channels**0.5)
    if num_steps > len(table):
        table = F.interpolate(table.T[None], size=num_steps, mode="linear", align_corners=False)[0].T
    return table[:num_steps]


def attention(config: ActionFormerConfig, layers: Weights, x: Tensor, mask: Tensor, window: int | None) -> Tensor:
    """`mask` is that of the output; `x` may have twice as many steps."""
    stride = math.ceil(len(x) / len(mask))
    query, key, value = (
        layers.conv(
            layers.norm(layers.conv(x, f"{name}.conv", stride=stride) * mask[:, None], f"{name}.norm", 1e-5),
            f"{name}.linear",
        ).unflatten(1, (config.num_heads, -1))
        for name in ("query", "key", "value")
    )
    found = torch.zeros(len(mask), config.channels, dtype=x.dtype)
    for step in mask.nonzero()[:, 0].tolist():
        near = [at for at in mask.nonzero()[:, 0].tolist() if window is None or abs(at - step) <= window // 2]
        shares = ((query[step] * key[near]).sum(dim=2) / key.shape[2] ** 0.5).softmax(dim=0)
        found[step] = (shares[..., None] * value[near]).sum(dim=0).flatten()
    return layers.conv(found, "output") * mask[:, None]


def transformer(
    config: ActionFormerConfig, layers: Weights, x: Tensor, mask: Tensor, *, stride: int, window: int | None
) -> tuple[Tensor, Tensor]:
    normed, mask = layers.norm(x, "attention_norm", 1e-5), mask[::stride]
    attended = attention(config, layers.at("attention"), normed, mask, window)
    x = (pooled(x) if stride == 2 else x) * mask[:, None] + layers("attention_path.scale") * attended
    hidden = F.gelu(layers.conv(layers.norm(x, "mlp_norm", 1e-5), "mlp.0"))
    return x + layers("mlp_path.scale") * layers.conv(hidden, "mlp.3") * mask[:, None], mask


def sgp(config: TriDetConfig, layers: Weights, x: Tensor, mask: Tensor, *, stride: int) -> tuple[Tensor, Tensor]:
    if stride == 2:
        halved = pooled(x) if config.downsampling == "max" else layers.conv((x[::2] + x[1::2]) / 2, "pool.1")
        x, mask = halved, mask[::2]
    y = layers.norm(x, "norm", 1e-5)
    overall = torch.relu(layers.conv(y.mean(dim=0, keepdim=True), "overall"))
    instant, near, wide, gate = (layers.conv(y, name) for name in ("instant", "near", "wide", "gate"))
    scales = [1.0 if (scale := layers(f"{path}.scale")) is None else scale for path in ("path", "mlp_path")]
    x = x * mask[:, None] + scales[0] * (instant * overall + (near + wide) * gate + y)
    hidden = F.gelu(layers.conv(layers.group_norm(x, "mlp_norm", 16), "mlp.0"))
    return x + scales[1] * layers.conv(hidden, "mlp.2"), mask


def distances(bins: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """TriDet's expected distances of one level: (T, K, 2)."""
    most, found = bins.shape[1] // 2 - 1, torch.zeros(*starts.shape, 2, dtype=bins.dtype)
    for step, label, distance in np.ndindex(*starts.shape, 2):
        if distance:
            logits = [
                bins[step, most + 1 + d] + (ends[step + d, label] if step + d < len(ends) else 0.0)
                for d in range(most + 1)
            ]
        else:
            logits = [bins[step, most - d] + (starts[step - d, label] if step >= d else 0.0) for d in range(most + 1)]
        found[step, label, distance] = torch.stack(logits).softmax(dim=0) @ torch.arange(most + 1.0, dtype=bins.dtype)
    return found


def by_description(localizer: PyramidLocalizer, x: Tensor, mask: Tensor) -> Outputs:
    """What the localizer must predict for one clip, (T, C) and (T,)."""
    config, layers = localizer.config, Weights(localizer.state_dict())
    original = isinstance(config, ActionFormerConfig) and config.variant == "original"
    options = {"eps": 1e-5 if original else 1e-6, "again": not original}
    padding = config.padded_steps(len(x)) - len(x)
    x, mask = F.pad(x, (0, 0, 0, padding)), F.pad(mask, (0, padding))
    for number in range(config.num_embedding_convs):
        x = layers.at(f"encoder.embedding.{number}").embed(x, mask, **options)
    if getattr(config, "position_encoding", False):
        x = x + positions(config, len(x)) * mask[:, None]
    blocks = [(f"stem.{number}", 0, 1) for number in range(getattr(config, "num_stem_blocks", 0))]
    blocks += [(f"branch.{level - 1}", level, 2) for level in range(1, config.num_levels)]
    levels = {0: (x, mask)}
    for name, level, stride in blocks:
        block = layers.at(f"encoder.{name}")
        match config:
            case ActionFormerConfig():
                x, mask = transformer(config, block, x, mask, stride=stride, window=config.windows[level])
            case TriDetConfig():
                x, mask = sgp(config, block, x, mask, stride=stride)
            case TemporalMaxerConfig():
                mask = pooled(mask[:, None].double())[:, 0] > 0
                x = pooled(x) * mask[:, None]
        levels[level] = x, mask
    return heads(localizer, layers, list(levels.values()), options)


def heads(
    localizer: PyramidLocalizer, layers: Weights, levels: list[tuple[Tensor, Tensor]], options: dict[str, Any]
) -> Outputs:
    config, logits, offsets = localizer.config, [], []
    for level, (x, mask) in enumerate(levels):
        match getattr(config, "level_norm", "layer"):
            case "layer":
                x = layers.norm(x, f"level_norms.{level}", options["eps"])
            case "group":
                x = layers.group_norm(x, f"level_norms.{level}", config.level_norm_groups)
        tower = {
            name: layers.at(name).tower(x, mask, config.num_head_convs, **options)
            for name in ("classifier", "regressor", "regressor.starts", "regressor.ends")
            if layers(f"{name}.output.weight") is not None
        }
        logits.append(tower["classifier"])
        positive = torch.relu(layers(f"regressor.scales.{level}.scale") * tower["regressor"])
        boundaries = list(tower.values())[2:]
        offsets.append(distances(positive, *boundaries) if boundaries else positive)
    return torch.cat(logits), torch.cat(offsets), torch.cat([mask for _, mask in levels])


def some_config(kind: str, random: np.random.Generator) -> Any:
    levels = int(random.integers(1, 4))
    shared = {
        "regression_ranges": tuple((2.0 * 2**level, 4.0 * 2**level) for level in range(levels)),
        "num_head_convs": int(random.integers(3)),
        "num_embedding_convs": int(random.integers(1, 3)),
        "kernel_size": int(random.choice([1, 3, 5])),
    }
    padded = {
        "position_encoding": bool(random.integers(2)),
        "max_num_steps": 2 ** (levels - 1) * int(random.integers(1, 4)),
        "num_stem_blocks": int(random.integers(3)),
        "path_drop": 0.0,
    }
    match kind:
        case "tridet":
            return TriDetConfig(
                **shared,
                **padded,
                channels=32,
                window=tuple(int(one) for one in random.choice([1, 3, 5], levels)),
                wide_ratio=float(random.choice([1.3, 1.5, 5.0])),
                mlp_channels=5,
                downsampling=("max", "average")[random.integers(2)],
                head_kernel_size=int(random.choice([1, 3, 5])),
                boundary_kernel_size=int(random.choice([1, 3])),
                num_bins=int(random.integers(1, 5)),
            )
        case "temporalmaxer":
            return TemporalMaxerConfig(
                **shared,
                channels=8,
                level_norm=("layer", "group", "none")[random.integers(3)],
                level_norm_groups=int(random.choice([1, 2, 8])),
                level_norm_affine=bool(random.integers(2)),
                input_dropout=0.0,
            )
    windows = tuple(None if one < 2 else int(one) for one in random.integers(8, size=levels))
    return ActionFormerConfig(
        **shared, **padded, channels=12, num_heads=int(random.choice([1, 2, 3])), attention_window=windows, variant=kind
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["opentad", "original", "tridet", "temporalmaxer"])
def test_predictions_are_those_of_the_description(kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    localizer = build_localizer(some_config(kind, random), in_channels=3, classes=["a", "b"][: 1 + seed % 2])
    assert isinstance(localizer, PyramidLocalizer)
    for parameter in localizer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    localizer = localizer.double()
    num_steps = int(random.integers(1, 13))
    lengths = torch.tensor([num_steps, int(random.integers(1, num_steps + 1))])
    mask = torch.arange(num_steps) < lengths[:, None]
    values = torch.where(mask[:, None], torch.randn(2, 3, num_steps, dtype=torch.float64), 0.0)
    outputs = localizer(Features(values, mask))
    for clip in range(2):
        logits, offsets, real = by_description(localizer, values[clip].T, mask[clip])
        assert torch.equal(outputs.mask[clip], real)
        # The table of positions is float32.
        torch.testing.assert_close(outputs.logits[clip][real], logits[real], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(outputs.offsets[clip][real], offsets[real], rtol=1e-6, atol=1e-6)
