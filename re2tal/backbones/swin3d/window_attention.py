"""Video Swin's attention: every token sees those of its own (shifted) window, with a bias by relative position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from re2tal.backbones.swin3d.biased_attention import attend
from re2tal.backbones.swin3d.shifted_windows import (
    Size3,
    WindowKinds,
    WindowRows,
    WindowTables,
    clip_window,
    pad_rows,
    pad_to_windows,
    partition,
    reorder,
    restore,
    shift_of_rows,
    unpad_rows,
    windows_per_axis,
)


class WindowAttention(nn.Module):
    """Multi-head attention inside (shifted) windows with a learned bias per relative position and head."""

    def __init__(self, channels: int, *, num_heads: int, window: Size3, shift: Size3, tables: WindowTables) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels do not divide into {num_heads} heads; choose embed_dim accordingly")
        self.num_heads = num_heads
        self.window = window
        self.shift = shift
        self.tables = tables
        num_offsets = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rows: WindowRows | None = None) -> Tensor:
        """(B, D, H, W, C) -> the same shape; with `rows`, x holds their tokens alone, in the order of `row_spans`."""
        if rows is None:
            window, shift = clip_window((x.shape[1], x.shape[2], x.shape[3]), self.window, self.shift)
            return self.proj(self._mix(x, window=window, shift=shift, wrapped=shift))
        window, shift = clip_window(rows.grid, self.window, self.shift)
        rolled, wrapped = shift_of_rows(rows, window=window, shift=shift)
        padded = pad_rows(x, rows, window=window, shift=shift)
        mixed = self._mix(padded, window=window, shift=rolled, wrapped=wrapped)
        return self.proj(unpad_rows(mixed, x, rows, window=window, shift=shift))

    def _mix(self, x: Tensor, *, window: Size3, shift: Size3, wrapped: Size3) -> Tensor:
        """Attention in windows of x rolled by `shift`, where the last one along an axis may be `wrapped` around."""
        grid = (x.shape[1], x.shape[2], x.shape[3])
        if not any(shift) and not any(wrapped):
            return restore(self._attend(partition(x, window=window, shift=shift), None), grid=grid, window=window)
        padded = pad_to_windows(x, window)
        shape = (x.shape[0], padded.shape[1], padded.shape[2], padded.shape[3])
        order, inverse = self.tables.tokens(shape, window=window, shift=shift, wrapped=wrapped, device=x.device)
        windows = reorder(padded.flatten(0, 3), order, inverse).view(-1, len(x), math.prod(window), x.shape[-1])
        counts = windows_per_axis(grid, window)
        kinds = self.tables.kinds(counts, window=window, shift=wrapped, device=x.device) if any(wrapped) else None
        attended = self._attend(windows, kinds)
        restored = reorder(attended.flatten(0, 2), inverse, order).view(padded.shape)
        return restored[:, : grid[0], : grid[1], : grid[2]]

    def _attend(self, windows: Tensor, kinds: WindowKinds | None) -> Tensor:
        """(windows, B, tokens, C), sorted by kind if there are kinds, -> the same."""
        num_windows, batch, num_tokens, _ = windows.shape
        qkv, bias = self.qkv(windows).flatten(0, 1), self._bias(num_tokens)
        runs = (
            [(num_windows * batch, None)]
            if kinds is None
            else [(size * batch, mask) for size, mask in zip(kinds.sizes, kinds.masks, strict=True)]
        )
        return attend(qkv, bias, runs).unflatten(0, (num_windows, batch))

    def _bias(self, num_tokens: int) -> Tensor:
        """(heads, tokens, tokens) learned logits by relative position."""
        table = self.relative_position_bias_table.t().contiguous()
        index = self.tables.position_index(self.window, num_tokens, device=table.device)
        return table.index_select(1, index).unflatten(1, (num_tokens, num_tokens))
