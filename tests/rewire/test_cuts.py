"""How a stage cuts branches: what is cut, along what, and what is refused."""

from __future__ import annotations

import pytest
import torch
from rewire.networks import CHANNELS, Block, ScaledBlock, frames, walker
from torch import Tensor, nn

from re2tal.rewire import Branch, RewiringConfig, by_samples, by_tokens, residual_branches, rewire


class CutBlock(ScaledBlock):
    """A block that owns a parameter, whose branch notes how many samples it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def noted(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen.append(len(x))
        return self.branch(x)


@residual_branches.register
def _(block: CutBlock) -> tuple[Branch, ...]:
    return (Branch("scaled", CutBlock.noted, through_block=True, cut=by_samples(inner_states=4)),)


def rewired(*kinds: type[nn.Module], **config: object) -> nn.Module:
    net = walker(*kinds)
    rewire(net, config=RewiringConfig(**config))
    return net


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    net(x).square().sum().backward()
    return [parameter.grad for parameter in net.parameters()]


def test_parts_by_samples_and_by_tokens_cover_the_state() -> None:
    block = nn.Identity()
    assert [part.spans for part in by_samples(1).parts(block, torch.Size((3, 9, 4)), 2)] == [((0, 1),), ((1, 3),)]
    parts = by_tokens(1).parts(block, torch.Size((2, 3, 5, 4, 8)), 2)
    assert [(part.axis, part.spans) for part in parts] == [(2, ((0, 2),)), (2, ((2, 5),))]
    assert len(by_tokens(1).parts(block, torch.Size((1, 1, 1, 1, 8)), 7)) == 1


def test_as_many_pieces_as_the_budget_asks_for() -> None:
    """A state of 2 x 16 x 8 float64 is 2 KiB; four of them in pieces of 4 KiB make 2."""
    x = frames()
    for kibibytes, wanted in ((8, [2]), (7.9, [1, 1]), (4, [1, 1]), (0.001, [1, 1])):
        net = rewired(CutBlock, chunk_mebibytes=kibibytes / 1024)
        assert net.stem(x).shape == (2, 16, CHANNELS)
        net(x)
        (block,) = net.layers._modules.values()
        assert block.seen == wanted


class Tracked(CutBlock):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(16, track_running_stats=True)


def test_a_norm_that_would_write_its_statistics_once_a_piece_is_refused() -> None:
    net = rewired(Tracked, chunk_mebibytes=1e-4)
    net.eval()(frames())
    with pytest.raises(ValueError, match="Tracked scaled cannot be run in pieces: its InstanceNorm1d takes its stat"):
        net.train()(frames())


def test_cut_and_uncut_branches_in_one_run() -> None:
    nets = [rewired(CutBlock, Block, CutBlock, chunk_mebibytes=chunk) for chunk in (None, 1e-4)]
    for found, wanted in zip(*(gradients(net, frames()) for net in nets), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_network_none_of_whose_branches_can_be_cut_is_refused_and_left_as_it_was() -> None:
    net = walker(Block)
    with pytest.raises(ValueError, match=r"chunk_mebibytes is 1, but no branch of this .* says how it may be cut"):
        rewire(net, config=RewiringConfig(chunk_mebibytes=1))
    rewire(net)


@pytest.mark.parametrize("chunk", [0, -1.0, float("nan")])
def test_an_impossible_budget_is_refused(chunk) -> None:
    with pytest.raises(ValueError, match=r"chunk_mebibytes is .*; give more than 0, or None for whole branches"):
        RewiringConfig(chunk_mebibytes=chunk)


def test_whole_blocks_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="the whole blocks of unit 'block' cannot be cut; set unit to 'branch'"):
        RewiringConfig(unit="block", chunk_mebibytes=1)


def test_a_tensor_with_a_row_per_sample_refuses_pieces_of_samples() -> None:
    net = rewired(CutBlock, chunk_mebibytes=1e-4)
    with pytest.raises(ValueError, match=r"CutBlock scaled cannot be run sample by sample: .* shape \(2, 16\)"):
        net(frames(), torch.ones(2, 16))
