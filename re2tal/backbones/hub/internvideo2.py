"""InternVideo2 (Wang et al., ECCV 2024): a ViT over patches of 14 x 14 pixels of single frames, clips of 8 frames.

    class token, patches + positions -> blocks -> mean over H and W, without the class token
    block:  x = x + drop_path1(ls1(attn(norm1(x))));  x = x + drop_path2(ls2(mlp(norm2(x))))

Norms are RMS norms. Queries and keys are normed over all heads together; `ls1` and `ls2` scale channels. Names are
those of the release. Its attention pooling, its last norm behind that and its heads are left out: they give one vector
per clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.base import BackboneConfig
from re2tal.backbones.hub.prenorm import attention_branch, mlp_branch
from re2tal.backbones.hub.pretrained import add_drop_path, clipwise, weights_file
from re2tal.backbones.hub.tiling import ClipEncoder, ClipwiseBackbone, pair, resize_positions
from re2tal.backbones.weights import KeyLayout, each
from re2tal.rewire import Branch, residual_branches


@dataclass(frozen=True)
class Size:
    """What differs between the networks of the family."""

    width: int
    depth: int
    heads: int
    hidden: int
    """Width inside of MLPs."""
    patch: int = 14
    picture: int = 224
    frames: int = 8

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the position table."""
        return self.frames, self.picture // self.patch, self.picture // self.patch


SIZES: dict[str, Size] = {
    "internvideo2_nano": Size(48, 4, 2, 96, patch=8, picture=32, frames=4),
    "internvideo2_1b": Size(1408, 40, 16, 6144),
    "internvideo2_6b": Size(3200, 48, 25, 12800),
}
EPS = 1e-6
LAYER_SCALE = 1e-5
PREFIX = "encoder.model."


def build(config: BackboneConfig) -> ClipwiseBackbone:
    """The size that `config.name` names, random or from `config.weights`, a file of the release or of ours.

    ValueError for a folder or a hub name: the transformers library has no InternVideo2.
    """
    if config.weights is not None and weights_file(config.weights) is None:
        raise ValueError(
            f"backbone.weights is {config.weights!r}, but {config.name} takes a file of the release: fetch the .pt, "
            ".pth or .safetensors file of the model, and give its path"
        )
    size = SIZES[config.name]
    model = InternVideo2(size)
    add_drop_path(model.blocks, config.drop_path, after=("drop_path1", "drop_path2"))
    return clipwise(InternVideo2Encoder(model, size), config, layouts=(original(size),))


class InternVideo2Encoder(ClipEncoder):
    """An InternVideo2 without its pooling, for frames of any size."""

    def __init__(self, model: InternVideo2, size: Size) -> None:
        super().__init__()
        self.model = model
        self.out_channels = size.width
        self.clip_frames = size.frames
        self.size = pair(size.picture)
        self.patch = (1, *pair(size.patch))

    def forward(self, clips: Tensor) -> Tensor:
        """(N, L, 3, H, W) -> (N, L, C)."""
        return self.model(clips)[:, 1:].unflatten(1, (self.clip_frames, -1)).mean(dim=2)


class InternVideo2(nn.Module):
    """Tokens of a clip, with the class token first."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.grid = size.grid
        self.patch_embed = PatchEmbedding(size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos_embed = nn.Parameter(sinusoid(size.grid, size.width))
        self.blocks = nn.ModuleList(Block(size, number=number) for number in range(1, size.depth + 1))
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, clips: Tensor) -> Tensor:
        """(N, L, 3, H, W) -> (N, 1 + L * rows * columns, C)."""
        patches = self.patch_embed(clips.transpose(1, 2))
        table = self.pos_embed.to(patches)
        grid = patches.shape[2], patches.shape[3], patches.shape[4]
        positions = resize_positions(table[:, 1:], grid=self.grid, new_grid=grid)
        class_token = (self.cls_token.to(patches) + table[:, :1]).expand(len(patches), -1, -1)
        x = torch.cat([class_token, patches.flatten(2).transpose(1, 2) + positions], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


class PatchEmbedding(nn.Module):
    """A convolution over patches of single frames."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        kernel = (1, size.patch, size.patch)
        self.proj = nn.Conv3d(3, size.width, kernel, stride=kernel)

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 3, L, H, W) -> (N, C, L, rows, columns)."""
        return self.proj(frames)


class RMSNorm(nn.RMSNorm):
    """torch's, whose input has one gradient however torch computes the norm.

    In mixed precision torch takes the norm apart and uses the input twice. Its gradients would join those of the skip
    one by one, and a sum of three depends on the order: recomputing would not give the bits of stored activations.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(.., C) -> the same shape."""
        return super().forward(x.view_as(x))


class Block(nn.Module):
    """A pre-norm block with layer scale."""

    def __init__(self, size: Size, *, number: int) -> None:
        """`number` is its place, from 1: later blocks start with smaller weights."""
        super().__init__()
        self.norm1 = RMSNorm(size.width, eps=EPS)
        self.attn = Attention(size.width, size.heads)
        self.ls1 = LayerScale(size.width)
        self.drop_path1 = nn.Identity()
        self.norm2 = RMSNorm(size.width, eps=EPS)
        self.mlp = MLP(size.width, size.hidden)
        self.ls2 = LayerScale(size.width)
        self.drop_path2 = nn.Identity()
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            last = layer in (self.attn.proj, self.mlp.fc2)
            nn.init.trunc_normal_(layer.weight, std=0.02 / (2 * number) ** 0.5 if last else 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, C) -> the same shape."""
        for branch in residual_branches(self):
            x = x + branch.function(self, x)
        return x


class Attention(nn.Module):
    """Attention of all tokens of a clip to each other; queries and keys are normed."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width, eps=EPS)
        self.k_norm = RMSNorm(width, eps=EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, C) -> the same shape."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        parts = (self.q_norm(query), self.k_norm(key), value)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(.., C) -> the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """(.., C) -> the same shape and dtype."""
        return (x * self.gamma).to(x.dtype)


@residual_branches.register
def _(block: Block) -> tuple[Branch, ...]:
    return (
        attention_branch("norm1", "attn", "ls1", "drop_path1"),
        mlp_branch("norm2", "mlp", "ls2", "drop_path2"),
    )


def sinusoid(grid: tuple[int, int, int], width: int) -> Tensor:
    """The table that training started from, (1, 1 + frames * rows * columns, C): zero for the class token.

    A quarter of the channels tells the frame, three eighths the column, and three eighths the row: sines, then cosines.
    """
    frames, rows, columns = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    share = width // 8
    waves = [_waves(frames, 2 * share), _waves(columns, 3 * share), _waves(rows, 3 * share)]
    return F.pad(torch.cat(waves, dim=1), (0, 0, 1, 0))[None]


def _waves(places: Tensor, channels: int) -> Tensor:
    speeds = 10000.0 ** (-torch.arange(channels // 2) / (channels / 2))
    angles = places[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def original(size: Size) -> KeyLayout:
    """The names of the release, with fused kernels and without: both hold the same entries.

    Its pre-training files hold decoders and a table for pictures beside the network, which are ignored. A position
    table in three parts becomes one. One for another number of frames, or of another picture size, is resampled as the
    release does it: linear in time, bicubic in space.
    """

    def reshape(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = f"{PREFIX}pos_embed"
        fitted = {name: _fitted(given[name], size.grid)} if name in given else {}
        return {**given, **fitted}

    network = r"(blocks\.|patch_embed\.|cls_token$|pos_embed$)"
    return KeyLayout(
        "original InternVideo2",
        anchor=r"blocks\.0\.attn\.q_norm\.weight",
        to_ours=each(lambda key: PREFIX + key, without=rf"(?!{network})"),
        from_ours=each(lambda key: key.removeprefix(PREFIX)),
        unpack=_with_one_table,
        reshape=reshape,
    )


def _with_one_table(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = [state.get(f"pos_embed_{part}") for part in ("spatial", "temporal", "cls")]
    space, time, class_token = parts
    if space is None or time is None or class_token is None:
        return dict(state)
    table = (time[:, :, None] + space[:, None]).flatten(1, 2)
    return {**state, "pos_embed": torch.cat([class_token, table], dim=1)}


def _fitted(table: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Resampled to `grid`. A table has the network's rows and columns, or its number of frames; its length tells which.

    Raises ValueError where it could be either.
    """
    number, (frames, rows, columns) = table.shape[1] - 1, grid
    side = round((number / frames) ** 0.5)
    readings = {(number // (rows * columns), rows, columns)} if number % (rows * columns) == 0 else set()
    readings |= {(frames, side, side)} if number == frames * side**2 else set()
    if not readings:
        return table  # the error about its shape names both
    if len(readings) > 1:
        raise ValueError(
            f"pos_embed holds {number} positions, which may be any of {sorted(readings)} (frames, rows, columns), so "
            f"it cannot be resampled to {grid}; resample it before, and save it in the file"
        )
    (given,) = readings
    series = table[:, 1:].unflatten(1, (given[0], -1))[0].permute(1, 2, 0).float()
    if given[0] != frames:
        series = F.interpolate(series, size=frames, mode="linear")
    placed = series.permute(2, 0, 1).flatten(0, 1)[None].to(table.dtype)
    placed = resize_positions(placed, grid=(frames, *given[1:]), new_grid=grid)
    return torch.cat([table[:, :1], placed], dim=1)
