"""Kinds of blocks that libraries have: layouts, identities, things appended and cut off, sums that are no last word."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from re2tal.rewire import RewiringConfig, rewire

WIDTH = 8


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.skip = nn.Identity()


class IdentitySkip(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.f(self.norm1(x)) + self.skip(x)
        return self.skip(x) + self.g(self.norm2(x))


class ReshapedBack(Parts):
    """timm's Swin: (B, H, W, C) in and out, the MLP on (B, H W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x + self.f(self.norm1(x))
        x = x.reshape(b, -1, c)
        x = x + self.g(self.norm2(x))
        return x.view(b, h, w, c)


class ChannelsFirst(Parts):
    """ViTDet: sums of the permuted state."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2).permute(0, 2, 3, 1)
        x = x.transpose(1, 2)
        x = x + self.f(self.norm1(x)).cumsum(1)
        x = x + self.g(self.norm2(x)).cumsum(2)
        return x.transpose(1, 2)


class Appended(Parts):
    """X-CLIP: a message is appended, and cut off behind the sum."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.size(1)
        x = torch.cat([x, self.g(x[:, :1])], dim=1)
        x = x + self.f(self.norm1(x)).cumsum(1)
        x = x[:, :rows]
        return x + self.g(self.norm2(x))


class TurnedAround(Parts):
    """No layout that gives the state back."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f(self.norm1(x))).transpose(1, 2)


class CutAtTheFront(Parts):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.size(1)
        x = torch.cat([x, self.g(x[:, :1])], dim=1)
        return (x + self.f(self.norm1(x)))[:, -rows:]


class PostNorm(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.f(x))
        return self.norm2(x + torch.relu(self.g(x)))


class Walker(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(kind() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def walker(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = Walker(kind)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double()


def pictures() -> Tensor:
    return torch.randn(2, 4, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def compared(model: nn.Module, example: tuple, *, unit: str) -> None:
    """Beta 0 against the plain network; recomputed gradients against kept activations at beta 1."""
    plain = model(*example)
    rewired = copy.deepcopy(model)
    rewire(rewired, config=RewiringConfig(unit=unit, beta=0.0), example=example)
    torch.testing.assert_close(rewired(*example), plain, rtol=1e-11, atol=1e-11)
    gradients = []
    for recompute in (True, False):
        rewired = copy.deepcopy(model)
        rewire(rewired, config=RewiringConfig(unit=unit, recompute=recompute), example=example)
        rewired(*example).square().mean().backward()
        gradients.append([parameter.grad for parameter in rewired.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [IdentitySkip, ReshapedBack, ChannelsFirst, Appended])
@pytest.mark.parametrize("unit", ["branch", "block"])
def test_these_are_rewired_exactly(kind, unit) -> None:
    model = walker(kind)
    report = rewire(copy.deepcopy(model), example=(pictures(),))
    assert [(stage.rewired_blocks, stage.branches[0].count("+")) for stage in report.stages] == [(4, 1)]
    compared(model, (pictures(),), unit=unit)


@pytest.mark.parametrize("kind", [TurnedAround, CutAtTheFront])
@pytest.mark.parametrize("example", [pictures(), torch.zeros(2, 4, 4, WIDTH, dtype=torch.float64)], ids=["any", "zero"])
def test_a_layout_or_cut_that_gives_another_state_is_refused(kind, example) -> None:
    with pytest.raises(ValueError, match="the branches found miss its result by"):
        rewire(walker(kind), example=(example,))


def test_a_norm_behind_the_sum_is_rewired_as_a_whole_where_that_is_asked_for() -> None:
    with pytest.raises(
        ValueError, match=r"\(post-norm\); as a whole, RewiringConfig\(unit='block'\), it can be rewired"
    ):
        rewire(walker(PostNorm), example=(pictures(),))
    with pytest.raises(ValueError, match="nothing is registered for PostNorm"):
        rewire(walker(PostNorm), config=RewiringConfig(unit="block"))
    compared(walker(PostNorm), (pictures(),), unit="block")


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torch_s_encoder_with_masks(norm_first, batch_first, activation) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(
                WIDTH, 2, 16, 0.1, activation, norm_first=norm_first, batch_first=batch_first
            )
            self.body = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

        def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
            return self.body(x, mask, padding)

    torch.manual_seed(0)
    model = Encoder().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    mask = torch.triu(torch.full((5, 5), True), 1)
    compared(model, (x if batch_first else x.transpose(0, 1), mask, padding), unit="branch" if norm_first else "block")
