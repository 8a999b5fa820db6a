"""Shifted windows over a (D, H, W) grid: how large, which tokens, and which of them may see each other.

    unshifted |. . . .|. . . .|. . . .|        shifted by 2, cyclically    |. . . .|. . . .|. . 0 0|

In a shifted grid only the last window along an axis holds tokens that are not neighbours (those wrapped around), so at
most 8 kinds of windows need a mask each, however large the grid. Windows are therefore kept sorted by kind, and a kind
is one attention call: the mask is (tokens, tokens), never (windows, tokens, tokens).

Tokens of a window and windows of a grid are counted D first, then H, then W.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Size3 = tuple[int, int, int]
Table = TypeVar("Table")


def clip_window(grid: Size3, window: Size3, shift: Size3) -> tuple[Size3, Size3]:
    """Along an axis that one window covers, the window shrinks to the grid and is not shifted."""
    covered = [size <= full for size, full in zip(grid, window, strict=True)]
    clipped = tuple(size if one else full for size, full, one in zip(grid, window, covered, strict=True))
    shifts = tuple(0 if one else step for step, one in zip(shift, covered, strict=True))
    return clipped, shifts  # type: ignore[return-value]


def partition(x: Tensor, *, window: Size3, shift: Size3) -> Tensor:
    """(B, D, H, W, C) -> windows first, (windows, B, tokens, C).

    The grid is padded with zeros at its far ends to whole windows. Padding takes part in attention, as in every
    published Video Swin: the released weights were trained so.
    """
    x = pad_to_windows(x, window)
    if any(shift):
        x = x.roll([-step for step in shift], dims=(1, 2, 3))
    b, d, h, w, c = x.shape
    wd, wh, ww = window
    x = x.view(b, d // wd, wd, h // wh, wh, w // ww, ww, c)
    return x.permute(1, 3, 5, 0, 2, 4, 6, 7).reshape(-1, b, wd * wh * ww, c)


def restore(windows: Tensor, *, grid: Size3, window: Size3) -> Tensor:
    """The inverse of `partition` without a shift: (windows, B, tokens, C) -> (B, D, H, W, C) without the padding."""
    b, c = windows.shape[1], windows.shape[-1]
    counts = windows_per_axis(grid, window)
    x = windows.view(*counts, b, *window, c).permute(3, 0, 4, 1, 5, 2, 6, 7)
    x = x.reshape(b, *(n * size for n, size in zip(counts, window, strict=True)), c)
    return x[:, : grid[0], : grid[1], : grid[2]]


def pad_to_windows(x: Tensor, window: Size3) -> Tensor:
    """(B, D, H, W, C) with zeros at the far ends, or x itself where it is whole windows: `F.pad` would copy it."""
    padding = _padding(x.shape[1:4], window)
    return F.pad(x, (0, 0, *padding)) if any(padding) else x


class TokenOrder(NamedTuple):
    """Where each token of a batch of grids goes, and back: roll, partition and sorting by kind as one copy."""

    order: Tensor
    """(B * tokens,) int32: place -> token"""
    inverse: Tensor
    """(B * tokens,) int32: token -> place"""


def token_order(
    shape: tuple[int, int, int, int], *, window: Size3, shift: Size3, order: Tensor | None, device: torch.device
) -> TokenOrder:
    """Of (B, D, H, W) whole windows: that of `partition`, with the windows in `order` where one is given."""
    tokens = torch.arange(math.prod(shape), dtype=torch.int32, device=device)
    windows = partition(tokens.view(*shape, 1), window=window, shift=shift)
    places = (windows if order is None else windows.index_select(0, order)).flatten()
    return TokenOrder(places, torch.empty_like(tokens).index_copy_(0, places.long(), tokens))


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(gradient, inverse, order), None, None


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order], (N, C); its gradient is gathered by `inverse`, where that of `index_select` would be added up."""
    return _Reorder.apply(x, order, inverse)


def windows_per_axis(grid: Size3, window: Size3) -> Size3:
    """How many windows cover the grid along D, H and W, the last one possibly padded."""
    return tuple(-(-size // full) for size, full in zip(grid, window, strict=True))  # type: ignore[return-value]


class WindowRows(NamedTuple):
    """Windows `first` to `stop` - 1 along one axis, all of them along the others; independent of the remaining ones.

    Along a shifted axis they are counted from where the shifted grid begins, so the last ones are wrapped around.
    """

    grid: Size3
    """The whole grid."""
    axis: int
    """0, 1 or 2 for D, H or W."""
    first: int
    stop: int


def row_spans(rows: WindowRows, *, window: Size3, shift: Size3) -> tuple[tuple[int, int], ...]:
    """(start, stop) of the tokens along the axis that the rows cover, without padding: one span, or two if wrapped."""
    start, stop, padded = _covered(rows, window=window, shift=shift)
    spans = ((start, min(stop, rows.grid[rows.axis])), (0, stop - padded))
    return tuple(span for span in spans if span[0] < span[1])


def shift_of_rows(rows: WindowRows, *, window: Size3, shift: Size3) -> tuple[Size3, Size3]:
    """What tokens that are in the order of `row_spans` are still to be rolled by, and which axes end wrapped around."""
    rolled = tuple(0 if axis == rows.axis else step for axis, step in enumerate(shift))
    is_last = rows.stop == windows_per_axis(rows.grid, window)[rows.axis]
    return rolled, shift if is_last else rolled  # type: ignore[return-value]


def pad_rows(x: Tensor, rows: WindowRows, *, window: Size3, shift: Size3) -> Tensor:
    """Tokens in the order of `row_spans`, (B, D, H, W, C) -> whole windows along the axis; zeros where padding is."""
    head, padding, tail = _padding_of_rows(x.shape, rows, window=window, shift=shift)
    if not padding:
        return x
    before, behind = x.split([head, tail], 1 + rows.axis)
    zeros = x.new_zeros([padding if axis == 1 + rows.axis else size for axis, size in enumerate(x.shape)])
    return torch.cat([before, zeros, behind], 1 + rows.axis)


def unpad_rows(x: Tensor, like: Tensor, rows: WindowRows, *, window: Size3, shift: Size3) -> Tensor:
    """The inverse of `pad_rows` for a tensor of the size of `like`."""
    head, padding, tail = _padding_of_rows(like.shape, rows, window=window, shift=shift)
    if not padding:
        return x
    before, _, behind = x.split([head, padding, tail], 1 + rows.axis)
    return torch.cat([before, behind], 1 + rows.axis)


def _covered(rows: WindowRows, *, window: Size3, shift: Size3) -> Size3:
    """Start and stop along the axis of the padded grid, beyond its end where wrapped around, and that grid's size."""
    size, step = window[rows.axis], shift[rows.axis]
    padded = size * windows_per_axis(rows.grid, window)[rows.axis]
    return rows.first * size + step, rows.stop * size + step, padded


def _padding_of_rows(shape: torch.Size, rows: WindowRows, *, window: Size3, shift: Size3) -> Size3:
    """Tokens before the padding, padding, and tokens behind it, along the axis."""
    start, stop, _ = _covered(rows, window=window, shift=shift)
    num_tokens = shape[1 + rows.axis]
    head = min(num_tokens, max(0, rows.grid[rows.axis] - start))
    return head, stop - start - num_tokens, num_tokens - head


def _padding(grid: torch.Size, window: Size3) -> list[int]:
    """Far-end padding in the order of `F.pad`: last axis first."""
    missing = [-size % full for size, full in zip(grid, window, strict=True)]
    return [0, missing[2], 0, missing[1], 0, missing[0]]


def window_regions(counts: Size3, *, window: Size3, shift: Size3) -> np.ndarray:
    """(windows, tokens) int: inside one window, tokens attend to each other where these numbers agree."""
    regions = np.zeros((*counts, *window), dtype=np.int64)
    for axis, (count, size, step) in enumerate(zip(counts, window, shift, strict=True)):
        if step:
            wrapped = np.zeros((count, size), dtype=np.int64)
            wrapped[-1, size - step :] = 2**axis
            shape = [1] * 6
            shape[axis], shape[3 + axis] = count, size
            regions += wrapped.reshape(shape)
    return regions.reshape(int(np.prod(counts)), int(np.prod(window)))


def relative_position_index(window: Size3, num_tokens: int) -> np.ndarray:
    """(tokens, tokens) row of the bias table for each pair among the first `num_tokens` tokens of a full window.

    A clipped window has fewer tokens and takes the first rows and columns of the full window's index. That is exact
    when only D is clipped; when H or W is, it addresses other rows than geometry would: kept, because every published
    Video Swin does so and was trained so.
    """
    coordinates = np.stack(np.unravel_index(np.arange(num_tokens), window), axis=1)
    offsets = coordinates[:, None] - coordinates[None] + (np.array(window) - 1)
    return np.ravel_multi_index(tuple(np.moveaxis(offsets, -1, 0)), tuple(2 * size - 1 for size in window))


class WindowKinds(NamedTuple):
    """Windows sorted by kind; `sizes[k]` consecutive ones share `masks[k]`."""

    order: Tensor
    """(windows,) int64: sorted place -> window"""
    sizes: tuple[int, ...]
    masks: Tensor
    """(kinds, tokens, tokens) bool, True where attention is *not* allowed"""


def window_kinds(counts: Size3, *, window: Size3, shift: Size3, device: torch.device) -> WindowKinds:
    """Sort the windows of a shifted grid by the mask they need."""
    regions = window_regions(counts, window=window, shift=shift)
    patterns, kind = np.unique(regions, axis=0, return_inverse=True)
    order = np.argsort(kind.reshape(-1), kind="stable")
    masks = patterns[:, :, None] != patterns[:, None, :]
    return WindowKinds(
        order=torch.from_numpy(order).to(device),
        sizes=tuple(np.bincount(kind.reshape(-1)).tolist()),
        masks=torch.from_numpy(masks).to(device),
    )


class WindowTables:
    """Index tables by (grid, window, shift, device), built once and shared by the blocks of one model.

    They belong to a model rather than to the process, so that one traced on fake tensors leaves none behind. The
    least recently used goes when there are more than `capacity`.
    """

    def __init__(self, *, capacity: int = 64) -> None:
        self._capacity = capacity
        self._tables: OrderedDict[Hashable, object] = OrderedDict()

    def position_index(self, window: Size3, num_tokens: int, *, device: torch.device) -> Tensor:
        """`relative_position_index`, flattened: (tokens * tokens,) int64."""
        return self._get(
            ("index", window, num_tokens, device),
            lambda: torch.from_numpy(relative_position_index(window, num_tokens).reshape(-1)).to(device),
        )

    def kinds(self, counts: Size3, *, window: Size3, shift: Size3, device: torch.device) -> WindowKinds:
        """`window_kinds` of a shifted grid."""
        return self._get(
            ("kinds", counts, window, shift, device),
            lambda: window_kinds(counts, window=window, shift=shift, device=device),
        )

    def tokens(
        self, shape: tuple[int, int, int, int], *, window: Size3, shift: Size3, wrapped: Size3, device: torch.device
    ) -> TokenOrder:
        """`token_order` of (B, D, H, W) rolled by `shift`; windows sorted by kind where last ones are `wrapped`."""

        def build() -> TokenOrder:
            counts = windows_per_axis(shape[1:], window)
            order = self.kinds(counts, window=window, shift=wrapped, device=device).order if any(wrapped) else None
            return token_order(shape, window=window, shift=shift, order=order, device=device)

        return self._get(("tokens", shape, window, shift, wrapped, device), build)

    def _get(self, key: Hashable, build: Callable[[], Table]) -> Table:
        if key not in self._tables:
            # A table first built under inference mode must still serve a later training step.
            with torch.inference_mode(False):
                self._tables[key] = build()
            while len(self._tables) > self._capacity:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]  # type: ignore[return-value]
