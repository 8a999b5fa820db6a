"""VSGN's network (Zhao et al., ICCV 2021): a pyramid encoder and decoder, anchor heads, and two looks at boundaries.

    encoder level   x -> pool(relu(temporal(x) + graph(x))), or a convolution of stride 2
    decoder level   x -> relu(conv(relu(conv(encoder level)) + relu(upsample(coarser decoder level))))

Masks are (B, T), True where a step is real.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.masked import blank
from re2tal.structures import Pyramid


def conv_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """(B, in_channels, T) -> (B, out_channels, T)."""
    return nn.Sequential(nn.Conv1d(in_channels, out_channels, 3, padding=1), nn.ReLU())


class MaskedConvReLU(nn.Module):
    """Convolution and ReLU, zero in the padding: (B, in_channels, T) -> (B, out_channels, T / stride)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(in_channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_channels, T), (B, T) -> the same with T / stride steps."""
        # A step of the output is real where the middle of the three that it reads is.
        mask = mask[:, :: self.stride]
        return torch.relu(blank(self.conv(x), mask)), mask


class GraphConv(nn.Module):
    """The largest response of a step to the steps whose features are nearest to its own."""

    def __init__(self, channels: int, *, num_neighbours: int) -> None:
        super().__init__()
        self.num_neighbours = num_neighbours
        self.linear = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor, copied: Tensor | None = None) -> Tensor:
        """(B, C, T) -> (B, C, T); `copied` (B, T) is as in `nearest`."""
        steps = x.transpose(1, 2)
        neighbours = nearest(steps, self.num_neighbours, copied)
        clip = torch.arange(len(steps), device=x.device)[:, None, None]
        centre = steps[:, :, None].expand(-1, -1, neighbours.shape[2], -1)
        return self.linear(torch.cat([steps[clip, neighbours], centre], dim=-1)).amax(dim=2).transpose(1, 2)


@torch.no_grad()
def nearest(steps: Tensor, num_neighbours: int, copied: Tensor | None = None) -> Tensor:
    """(B, T, C) -> (B, T, num_neighbours): the indices of the steps at the smallest distance, a step itself among them.

    Fewer where there are not as many steps. Distances are exact differences, not products: neighbours change with the
    last bits. `copied` (B, T) is True in the magnified copy of a stitched clip, whose steps are much like their
    neighbours: the second half of the neighbours of a step there lies outside the copy, so that edges cross scales.
    """
    distances = torch.cdist(steps.float(), steps.float(), compute_mode="donot_use_mm_for_euclid_dist")
    # A coarse level of a short clip may have fewer steps.
    count = min(num_neighbours, steps.shape[1])
    if copied is None:
        return distances.topk(count, dim=2, largest=False).indices
    near = distances.topk((count + 1) // 2, dim=2, largest=False).indices
    # Those that were taken are out as well.
    distances = distances.masked_fill(copied[:, :, None] & copied[:, None], torch.inf).scatter(2, near, torch.inf)
    return torch.cat([near, distances.topk(count // 2, dim=2, largest=False).indices], dim=2)


class GraphLevel(nn.Module):
    """One level of the cross-scale graph pyramid: convolution and graph, then half as many steps."""

    def __init__(self, channels: int, *, num_neighbours: int, pool_size: int = 3) -> None:
        super().__init__()
        self.temporal = nn.Conv1d(channels, channels, 3, padding=1)
        self.graph = GraphConv(channels, num_neighbours=num_neighbours)
        # Padding of 1 for three steps, 0 for two: half as many steps either way.
        self.pool = nn.MaxPool1d(pool_size, stride=2, padding=pool_size // 3)

    def forward(self, x: Tensor, mask: Tensor, copied: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, T), (B, T) -> the same with T / 2 steps; a step is real if any that it was pooled from is."""
        pooled = self.pool(torch.relu(self.temporal(x) + self.graph(x, copied)))
        mask = self.pool(mask.to(x.dtype)) > 0
        return blank(pooled, mask), mask


class PyramidEncoder(nn.Module):
    """(B, in_channels, T) -> L levels, the first of stride `first_stride`, each half as long as the one before."""

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int,
        num_levels: int,
        first_stride: int,
        num_neighbours: int | None,
        pool_size: int = 3,
    ) -> None:
        super().__init__()
        self.stem = MaskedConvReLU(in_channels, channels, stride=first_stride // 2)
        self.has_graph = num_neighbours is not None
        self.levels = nn.ModuleList(
            MaskedConvReLU(channels, channels, stride=2)
            if num_neighbours is None
            else GraphLevel(channels, num_neighbours=num_neighbours, pool_size=pool_size)
            for _ in range(num_levels)
        )

    def forward(self, x: Tensor, mask: Tensor, copied: Tensor | None = None) -> Pyramid:
        """(B, in_channels, T), (B, T) -> levels (B, channels, T_l) and their masks, finest first.

        `copied` (B, T): the steps of the magnified copies, where clips are stitched.
        """
        x, mask = self.stem(x, mask)
        levels, masks = [], []
        stride = self.stem.stride
        for level in self.levels:
            # Plain convolutions have no neighbours to choose.
            if self.has_graph and copied is not None:
                x, mask = level(x, mask, copied[:, ::stride])
            else:
                x, mask = level(x, mask)
            stride *= 2
            levels.append(x)
            masks.append(mask)
        return Pyramid(tuple(levels), tuple(masks))


class PyramidDecoder(nn.Module):
    """From the coarsest level to the finest, each mixed with the encoder's of the same length."""

    def __init__(self, channels: int, *, num_levels: int) -> None:
        super().__init__()
        self.top = conv_relu(channels, channels)
        self.laterals = nn.ModuleList(conv_relu(channels, channels) for _ in range(num_levels - 1))
        self.ups = nn.ModuleList(
            # output_padding=1 gives twice as many steps; without it, one less.
            nn.Sequential(nn.ConvTranspose1d(channels, channels, 3, stride=2, padding=1, output_padding=1), nn.ReLU())
            for _ in range(num_levels - 1)
        )
        self.fuses = nn.ModuleList(conv_relu(channels, channels) for _ in range(num_levels - 1))

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Levels and masks, finest first, in and out; zero in the padding."""
        *finer, coarsest = pyramid.levels
        levels = [self.top(coarsest)]
        for encoded, lateral, up, fuse in zip(reversed(finer), self.laterals, self.ups, self.fuses, strict=True):
            levels.append(fuse(lateral(encoded) + up(levels[-1])))
        masked = (blank(level, mask) for level, mask in zip(reversed(levels), pyramid.masks, strict=True))
        return Pyramid(tuple(masked), pyramid.masks)


class AnchorHead(nn.Module):
    """Group-normalised convolutions over every level, then `out_channels` numbers per anchor."""

    def __init__(
        self, channels: int, *, num_convs: int, num_groups: int, num_scales: int, out_channels: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.tower = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv1d(channels, channels, 3, padding=1, bias=bias),
                    nn.GroupNorm(num_groups, channels),
                    nn.ReLU(),
                )
                for _ in range(num_convs)
            )
        )
        self.output = nn.Conv1d(channels, num_scales * out_channels, 3, padding=1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """L levels (B, C, T_l) -> (B, A, out_channels), anchors finest level first, then by position, then by scale."""
        predictions = torch.cat([self.output(self.tower(level)) for level in levels], dim=2)
        return predictions.transpose(1, 2).reshape(len(predictions), -1, self.out_channels)


class EvaluationHead(nn.Module):
    """Whether an action starts, ends, goes on at each step: logits (B, 3, T) from the finest level."""

    def __init__(self, channels: int, *, upsamples_scores: bool = False) -> None:
        """`upsamples_scores`: look at the finest level as it is and stretch the scores, as the original does; False
        stretches the features."""
        super().__init__()
        self.upsamples_scores = upsamples_scores
        self.branches = nn.ModuleList(
            nn.Sequential(*conv_relu(channels, channels), nn.Conv1d(channels, 1, 1)) for _ in range(3)
        )

    def forward(self, finest: Tensor, *, num_steps: int) -> Tensor:
        """(B, C, T_0) -> (B, 3, num_steps)."""
        if self.upsamples_scores:
            # The original stretches probabilities; back to logits, which both variants put out. eps: 0 and 1 have none.
            scores = torch.cat([branch(finest) for branch in self.branches], dim=1).sigmoid()
            return F.interpolate(scores, size=num_steps, mode="linear", align_corners=True).logit(eps=1e-7)
        x = F.interpolate(finest, size=num_steps, mode="linear", align_corners=True)
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class BoundaryHead(nn.Module):
    """How far to move the start and the end of each segment, from the finest level's features around each.

    Around a boundary means at it and an eighth of the segment's length before and after.
    """

    SHARE = 1 / 8

    def __init__(self, channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.start, self.end = (
            nn.Sequential(nn.Conv1d(channels, channels, 3, stride=2), nn.ReLU(), nn.Conv1d(channels, 1, 1))
            for _ in range(2)
        )

    def forward(self, finest: Tensor, segments: Tensor, *, num_steps: int) -> Tensor:
        """(B, C, T_0), segments (B, A, 2) in steps -> shifts (B, A, 2) in steps."""
        # Places are whole numbers, which have no gradient.
        clamped = segments.detach().clamp(0, num_steps - 1)
        reach = (clamped[..., 1] - clamped[..., 0] + 1) * self.SHARE
        shifts = [
            head(self._around(finest, boundary, reach)).view(segments.shape[:2])
            for head, boundary in ((self.start, clamped[..., 0]), (self.end, clamped[..., 1]))
        ]
        return torch.stack(shifts, dim=-1)

    def _around(self, finest: Tensor, boundary: Tensor, reach: Tensor) -> Tensor:
        """(B, C, T_0), two of (B, A) -> features (B * A, C, 3)."""
        times = torch.stack([boundary - reach, boundary, boundary + reach], dim=-1)
        places = (times / self.stride).long().clamp(0, finest.shape[2] - 1)
        clip = torch.arange(len(finest), device=finest.device)[:, None, None]
        return finest.transpose(1, 2)[clip, places].flatten(0, 1).transpose(1, 2)
