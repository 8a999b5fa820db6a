"""A step on fake tensors lives and dies as the real one: same peak, and nothing drawn from the generators."""

from __future__ import annotations

import gc

import pytest
import torch
from reversible.networks import CHANNELS, chain
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from re2tal.reversible import run, run_reversibly
from re2tal.reversible.chunking import ChunkedBranch, Piece, even_spans
from re2tal.reversible.fake import on_fake_tensors
from re2tal.reversible.live_bytes import LiveBytes

CPU = torch.device("cpu")


class Run(nn.Module):
    """A reversible run of branches, whole or cut by samples."""

    def __init__(self, kind: str, *, pieces: int = 1, dropout: float = 0.1, **options) -> None:
        super().__init__()
        self.branches = chain(kind, 6, dropout=dropout)
        self.pieces, self.options = pieces, options

    def forward(self, x: Tensor) -> Tensor:
        branches = [
            ChunkedBranch("branch", one, self._cut(one), same_draws=False, last=getattr(one, "down", None))
            for one in self.branches
        ]
        return run_reversibly(branches, x, owner=self, **self.options)

    def _cut(self, branch: nn.Module):
        return lambda state: [Piece(0, (span,), branch) for span in even_spans(len(state), self.pieces)]


def peak(module: nn.Module, *, autocast: bool) -> int:
    gc.collect()
    with LiveBytes() as live, torch.autocast("cpu", enabled=autocast):
        module(torch.zeros(32, CHANNELS, CHANNELS)).float().square().sum().backward()
    return live.peak


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("kind", "pieces"), [("transformer", 1), ("transformer", 3), ("conv", 1)])
def test_the_peak_on_fake_tensors_is_the_measured_one(kind, pieces, autocast) -> None:
    measured = peak(Run(kind, pieces=pieces), autocast=autocast)
    fake, mode = on_fake_tensors(lambda: Run(kind, pieces=pieces), dtype=torch.float32, device=CPU)
    with mode:
        predicted = peak(fake, autocast=autocast)
    assert predicted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"saved_branches": 2, "saved_outputs": 1}, {"recompute": False}], ids=str)
def test_pieces_that_are_left_out_change_no_byte(options, monkeypatch) -> None:
    """32 samples in 7 pieces: four or five in each. What is kept of pieces is counted of every one."""
    fake, mode = on_fake_tensors(lambda: Run("transformer", pieces=7, **options), dtype=torch.float32, device=CPU)

    def counted() -> tuple[int, int]:
        fake.zero_grad()
        gc.collect()
        with mode, LiveBytes() as live:
            loss = fake(torch.zeros(32, CHANNELS, CHANNELS)).square().sum()
            kept = live.live
            loss.backward()
        return kept, live.peak

    ran: list[int] = []
    for branch in fake.branches:
        branch.register_forward_hook(lambda *_: ran.append(1))
    few = counted(), len(ran)
    ran.clear()
    monkeypatch.setattr(run, "decisive", lambda pieces: pieces)
    every = counted(), len(ran)
    assert few[0] == every[0]
    assert (few[1] < every[1]) == options.get("recompute", True)


def test_a_mode_of_a_compiler_runs_every_piece() -> None:
    whole, ran = Run("transformer", pieces=7), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole.branches[0].register_forward_hook(lambda *_: ran.append(1))
        whole(torch.zeros(32, CHANNELS, CHANNELS))
    assert len(ran) == 7


def test_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    fake, mode = on_fake_tensors(lambda: Run("transformer", pieces=2), dtype=torch.float32, device=CPU)
    with mode:
        peak(fake, autocast=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_have_the_dtype_and_no_numbers() -> None:
    fake, mode = on_fake_tensors(lambda: nn.Linear(3, 100_000), dtype=torch.bfloat16, device=CPU)
    with mode:
        assert fake(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert [parameter.dtype for parameter in fake.parameters()] == [torch.bfloat16] * 2
    assert {parameter.untyped_storage().device.type for parameter in fake.parameters()} == {"meta"}


def test_bytes_are_counted_where_they_lie() -> None:
    """A fake tensor may lie on a device that is not there."""
    with FakeTensorMode(), torch.no_grad(), LiveBytes(torch.device("cuda")) as there, LiveBytes(CPU) as here:
        state = torch.empty(100, device="cuda")
        copy = state.to("cpu", copy=True)
        del state
        assert (there.live, there.peak, here.live) == (0, 400, 400)
        assert copy.device == CPU
