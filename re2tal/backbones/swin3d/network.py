"""Video Swin Transformer (Liu et al., CVPR 2022): attention in shifted (D, H, W) windows, four stages.

    patch embedding -> [blocks, patch merging] x (L - 1) -> blocks -> norm -> mean over H and W
    block:  x = x + drop_path(attention(norm1(x)));  x = x + drop_path(mlp(norm2(x)))

Everything between patch embedding and pooling is channels last, (B, D, H, W, C). Time is halved once, by the patches;
H and W are halved by them twice and by every merging once. Parameter names are those of the original release
(`layers.i.blocks.j.attn.qkv`, `layers.i.downsample`, `norm`); swin3d_layouts.py says how others call them.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.base import BackboneConfig, VideoBackbone, steps_mask
from re2tal.backbones.swin3d.layouts import KEY_LAYOUTS
from re2tal.backbones.swin3d.shifted_windows import (
    Size3,
    WindowRows,
    WindowTables,
    clip_window,
    row_spans,
    windows_per_axis,
)
from re2tal.backbones.swin3d.window_attention import WindowAttention
from re2tal.backbones.weights import load_weights
from re2tal.reversible.chunking import even_spans
from re2tal.rewire import (
    Branch,
    CheckpointedModule,
    Cut,
    Part,
    by_tokens,
    checkpointed,
    residual_branches,
    why_not_residual,
)
from re2tal.structures import Features


class VideoSwin(VideoBackbone):
    """Video Swin of any size: (B, 3, T, H, W) -> features (B, embed_dim * 2**(L-1), ceil(T / patch[0])).

    A step is valid where any of its frames is. Sizes that are not whole patches are padded with zeros at the far end.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window: Size3,
        patch: Size3 = (2, 4, 4),
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"VideoSwin needs one num_heads per stage, got depths {depths} and num_heads {num_heads}")
        # Plain numbers, not a tensor: networks are also built on the meta device, where tensors have none.
        rates = iter([drop_path * j / max(1, sum(depths) - 1) for j in range(sum(depths))])
        tables = WindowTables()
        self.patch_embed = PatchEmbed(embed_dim, patch=patch)
        self.layers = nn.ModuleList()
        for index, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            blocks = [
                SwinBlock(
                    embed_dim * 2**index,
                    num_heads=heads,
                    window=window,
                    shift=(0, 0, 0) if j % 2 == 0 else (window[0] // 2, window[1] // 2, window[2] // 2),
                    mlp_ratio=mlp_ratio,
                    drop_path=next(rates),
                    tables=tables,
                )
                for j in range(depth)
            ]
            self.layers.append(SwinStage(blocks, merging=index + 1 < len(depths)))
        self.out_channels = embed_dim * 2 ** (len(depths) - 1)
        self.frames_per_step = patch[0]
        self.norm = nn.LayerNorm(self.out_channels)
        self.apply(_initialise)

    def forward(self, frames: Tensor, mask: Tensor) -> Features:
        """(B, 3, T, H, W) normalised float frames and their (B, T) bool mask -> Features (B, C, T')."""
        x = self.patch_embed(frames)
        for layer in self.layers:
            for part in layer.children():  # its blocks, then its merging
                x = part(x)
        values = self.norm(x).mean(dim=(2, 3)).transpose(1, 2)
        return Features(values, steps_mask(mask, frames_per_step=self.frames_per_step))


def _initialise(module: nn.Module) -> None:
    # By fan: the usual 0.02 suits widths of several hundred; the branches of a narrow network it leaves all but silent.
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class PatchEmbed(CheckpointedModule):
    """Non-overlapping patches: (B, 3, T, H, W) -> (B, D, H', W', C), normalised."""

    def __init__(self, channels: int, *, patch: Size3) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(3, channels, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(channels)

    @checkpointed
    def forward(self, frames: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, H', W', C)."""
        t, h, w = (-size % full for size, full in zip(frames.shape[2:], self.patch, strict=True))
        frames = F.pad(frames, (0, w, 0, h, 0, t)) if t or h or w else frames  # with nothing to pad it would copy
        return self.norm(self.proj(frames).movedim(1, -1))


class SwinStage(nn.Module):
    """Blocks of one resolution, the residual run that rewiring takes over, then patch merging (not in the last).

    `VideoSwin` calls the two one after the other: a call of the stage would hold its input until both are through.
    """

    def __init__(self, blocks: list[SwinBlock], *, merging: bool) -> None:
        super().__init__()
        self.blocks: nn.Module = nn.Sequential(*blocks)
        self.downsample = PatchMerging(blocks[0].channels) if merging else None


class PatchMerging(CheckpointedModule):
    """2 x 2 neighbouring pixels become one: (B, D, H, W, C) -> (B, D, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    @checkpointed
    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> (B, D, ceil(H/2), ceil(W/2), 2C)."""
        if x.shape[2] % 2 or x.shape[3] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        # Neighbours are concatenated column by column: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column).
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 2, 4, 5, 3, 6).flatten(4)
        return self.reduction(self.norm(x))


@why_not_residual.register
def _(merging: PatchMerging) -> str:
    return "they change width and resolution (downsampling)"


class SwinBlock(nn.Module):
    """Two residual branches: windowed attention, then MLP."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        window: Size3,
        shift: Size3,
        mlp_ratio: float,
        drop_path: float,
        tables: WindowTables,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, num_heads=num_heads, window=window, shift=shift, tables=tables)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, hidden=int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def attention_branch(self, x: Tensor, *, rows: WindowRows | None = None) -> Tensor:
        """What the first half adds to x: (B, D, H, W, C) -> the same shape; x may be those rows of windows alone."""
        return self.drop_path(self.attn(self.norm1(x), rows))

    def mlp_branch(self, x: Tensor) -> Tensor:
        """What the second half adds to x: (B, D, H, W, C) -> the same shape."""
        return self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> the same shape."""
        x = x + self.attention_branch(x)
        return x + self.mlp_branch(x)


@residual_branches.register
def _(block: SwinBlock) -> tuple[Branch, ...]:
    return (
        Branch("attention", SwinBlock.attention_branch, cut=Cut(_rows_of_windows, _inside_attention), last="attn.proj"),
        Branch(
            "mlp",
            SwinBlock.mlp_branch,
            cut=by_tokens(inner_states=1 + 3 * block.mlp.fc1.out_features / block.channels),
            last="mlp.fc2",
        ),
    )


def _rows_of_windows(block: nn.Module, shape: torch.Size, num: int) -> list[Part]:
    """Along the axis with most windows."""
    assert isinstance(block, SwinBlock)
    grid = (shape[1], shape[2], shape[3])
    window, shift = clip_window(grid, block.attn.window, block.attn.shift)
    counts = windows_per_axis(grid, window)
    axis = counts.index(max(counts))
    every = [WindowRows(grid, axis, first, stop) for first, stop in even_spans(counts[axis], num)]
    return [
        Part(1 + axis, row_spans(rows, window=window, shift=shift), partial(SwinBlock.attention_branch, rows=rows))
        for rows in every
    ]


def _inside_attention(block: nn.Module, shape: torch.Size) -> float:
    """A window's weights do not count on a CPU, where those of few windows are there at once. CUDA's kernel writes the
    gradient of the bias for every window before it is summed."""
    assert isinstance(block, SwinBlock)
    window, _ = clip_window((shape[1], shape[2], shape[3]), block.attn.window, block.attn.shift)
    weights = block.attn.num_heads * window[0] * window[1] * window[2] / block.channels
    return 9 if block.attn.proj.weight.device.type == "cpu" else 9 + weights


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, channels: int, *, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same shape."""
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """In training, drops a branch for a random share `rate` of the clips and scales up the rest (default generator)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path is {rate}; give a rate of at least 0 and below 1")
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(B, ...) -> the same shape."""
        if not self.training or self.rate == 0:
            return branch
        keep = 1 - self.rate
        kept = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(keep)
        return branch * (kept / keep)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"rate={self.rate:.3f}"


# The paper's sizes (window as trained on Kinetics), and one that learns from nothing on a CPU.
SIZES: dict[str, dict] = {
    "swin3d_nano": {
        "embed_dim": 24,
        "depths": (2, 2, 2),
        "num_heads": (2, 4, 8),
        "window": (4, 4, 4),
    },
    "swin3d_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window": (8, 7, 7)},
    "swin3d_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "window": (8, 7, 7)},
    "swin3d_base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "window": (8, 7, 7)},
}


def build_swin3d(config: BackboneConfig) -> VideoSwin:
    """The size that `config.name` names, random or from `config.weights`."""
    swin = VideoSwin(**SIZES[config.name], drop_path=config.drop_path)
    if config.weights is not None:
        load_weights(swin, config.weights, layouts=KEY_LAYOUTS)
    return swin
