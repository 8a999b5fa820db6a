"""What modules in a run hold besides parameters: an error where it changes before backward; counters are told."""

from __future__ import annotations

import logging
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import run_reversibly
from re2tal.reversible.attributes import _Value

VALUES = {"scale": 0.5, "name": "other", "bias": torch.ones(4), "limit": None}


class Scaled(nn.Module):
    limit = 8.0  # of the type, until somebody sets it on the instance

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)
        self.scale, self.name, self.bias, self.limit = 1.0, "tanh", torch.zeros(4), float("nan")
        self.last, self.length, self.calls = None, 3, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * torch.tanh(self.f(x)) + self.bias
        self.last, self.length = y.detach(), len(x)
        return y


class Counting(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def output_of(kind: type[Scaled] = Scaled, *, recompute: bool = True, rows: int = 3) -> tuple[nn.ModuleList, Tensor]:
    blocks = nn.ModuleList([kind(), kind()])
    return blocks, run_reversibly(list(blocks), torch.randn(rows, 4), recompute=recompute, owner=blocks).sum()


def gradients(blocks: nn.ModuleList, *outputs: Tensor) -> list[Tensor]:
    blocks.zero_grad()
    for output in outputs:
        output.sum().backward()
    return [weight.grad.clone() for weight in blocks.parameters() if weight.grad is not None]


@pytest.mark.parametrize("name", VALUES)
def test_one_that_is_set_before_backward_is_an_error(name) -> None:
    blocks, output = output_of()
    setattr(blocks[1], name, VALUES[name])
    match = rf"{name} of a Scaled, a module of a reversible run.* changed between forward and backward \(it was"
    with pytest.raises(RuntimeError, match=match):
        output.backward()


def test_a_tensor_that_is_written_is_an_error() -> None:
    blocks, output = output_of()
    blocks[0].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"bias of a Scaled.*it was a tensor, and is another"):
        output.backward()


def triple(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return 3 * output


def test_a_hook_that_is_removed_or_added_is_an_error() -> None:
    """`with steered(model): loss = model(x)`, and backward behind it."""
    blocks = nn.ModuleList([Scaled(), Scaled()])
    handle = blocks[0].f.register_forward_hook(triple)
    removed = run_reversibly(list(blocks), torch.randn(3, 4), owner=blocks).sum()
    handle.remove()
    added = run_reversibly(list(blocks), torch.randn(3, 4), owner=blocks).sum()
    for output in (removed, added):
        with pytest.raises(RuntimeError, match=r"_forward_hooks of a Linear.* changed between forward and backward"):
            output.backward()
        blocks[0].f.register_forward_hook(triple)


def test_a_module_that_is_exchanged_is_an_error() -> None:
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2)])
    output = run_reversibly(list(blocks), torch.randn(3, 4), owner=blocks).sum()
    blocks[1][1] = nn.Tanh()
    with pytest.raises(RuntimeError, match=r"1 of a Sequential.*\(it was a GELU, and is a Tanh\)"):
        output.backward()


def test_a_parameter_with_other_data_is_an_error() -> None:
    blocks, output = output_of()
    blocks[0].f.weight.data = blocks[0].f.weight.data * 2
    with pytest.raises(RuntimeError, match=r"0\.f\.weight, a parameter .* or has other data"):
        output.backward()


def test_what_a_forward_sets_itself_is_none_of_an_outsider() -> None:
    blocks = nn.ModuleList([Scaled(), Scaled()])
    given = [torch.randn(rows, 4) for rows in (3, 3, 2)]
    wanted = gradients(blocks, *(run_reversibly(list(blocks), x, owner=blocks, recompute=False) for x in given))
    outputs = [run_reversibly(list(blocks), x, owner=blocks) for x in given]
    blocks[0].scale = 1.0  # as it was
    torch.testing.assert_close(gradients(blocks, *outputs), wanted)


def test_where_activations_are_kept_it_may_change() -> None:
    blocks = nn.ModuleList([Scaled(), Scaled()])
    x = torch.randn(3, 4)
    wanted = gradients(blocks, run_reversibly(list(blocks), x, owner=blocks, recompute=False))
    output = run_reversibly(list(blocks), x, owner=blocks, recompute=False)
    blocks[1].scale = 0.5
    torch.testing.assert_close(gradients(blocks, output), wanted)


def test_one_that_counts_is_told_once(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            output_of(Counting)[1].backward()
            output_of(Scaled)[1].backward()
    (message,) = caplog.messages
    assert message.startswith("calls of a Counting counts by 1 in forward, and once more in backward")


class Told(nn.Module):
    """Its blocks share what a parent tells them."""

    def __init__(self, told: Any) -> None:
        super().__init__()
        self.f, self.told = nn.Linear(4, 4), told

    def forward(self, x: Tensor) -> Tensor:
        told = self.told if isinstance(self.told, dict | list) else vars(self.told)
        return (told[0][0] if isinstance(told, list) else told["step"]) * torch.tanh(self.f(x))


def other_step(told: Any, step: float | Tensor) -> None:
    if isinstance(told, list):
        told[0][0] = step
    else:
        (told if isinstance(told, dict) else vars(told))["step"] = step


@pytest.mark.parametrize("kind", [dict, SimpleNamespace, list], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("step", [2.0, torch.ones(4)], ids=["number", "tensor"])
def test_what_lists_dicts_and_objects_hold_is_an_error_where_it_changes(kind, step) -> None:
    told = [[step, "name"]] if kind is list else kind(step=step, name="name")
    blocks = nn.ModuleList([Told(told), Told(told)])
    outputs = [run_reversibly(list(blocks), torch.randn(3, 4), owner=blocks).sum() for _ in range(2)]
    other_step(told, step)
    outputs[0].backward()
    other_step(told, 3.0)
    with pytest.raises(
        RuntimeError, match=r"told(\[0\]\[0\]|\['step'\]|\.step) of a Told, .* \(it was .*, and is 3\.0"
    ):
        outputs[1].backward()


def test_an_entry_less_is_an_error_and_one_more_is_not() -> None:
    blocks = nn.ModuleList([Told({"step": 1.0})])
    outputs = [run_reversibly(list(blocks), torch.randn(3, 4), owner=blocks).sum() for _ in range(2)]
    blocks[0].told["collected"] = torch.ones(4)
    outputs[0].backward()
    del blocks[0].told["step"]
    with pytest.raises(RuntimeError, match=r"told\['step'\] of a Told, .* \(it was 1.0, and is None\)"):
        outputs[1].backward()


def test_another_dict_is_an_error_only_where_it_holds_something_else() -> None:
    told = {"step": 1.0}
    blocks = nn.ModuleList([Told(told), Told(told)])
    outputs = [run_reversibly(list(blocks), torch.randn(3, 4), owner=blocks).sum() for _ in range(2)]
    blocks[0].told = blocks[1].told = {"step": 1.0}
    outputs[0].backward()
    blocks[1].told = {"step": 3.0}
    with pytest.raises(RuntimeError, match=r"told of a Told"):
        outputs[1].backward()


def test_tables_that_a_forward_fills_are_no_error() -> None:
    class Table(Told):
        def forward(self, x: Tensor) -> Tensor:
            self.told.setdefault(len(x), torch.full((4,), float(len(x))))
            return self.told[len(x)] * torch.tanh(self.f(x))

    blocks = nn.ModuleList([Table({}), Table({})])
    given = [torch.randn(rows, 4) for rows in (3, 2, 3)]
    wanted = gradients(blocks, *(run_reversibly(list(blocks), x, owner=blocks, recompute=False) for x in given))
    for block in blocks:
        block.told.clear()
    outputs = [run_reversibly(list(blocks), x, owner=blocks) for x in given]
    torch.testing.assert_close(gradients(blocks, *outputs), wanted)


class Recorder(Told):
    """Its blocks put a loss each into one list."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.f(x))
        self.told.append(y.detach().mean())
        return y


def test_losses_that_stages_collect_may_be_taken_out_before_backward() -> None:
    losses: list[Tensor] = []
    stages = [nn.ModuleList([Recorder(losses), Recorder(losses)]) for _ in range(2)]
    given = torch.randn(3, 4)
    found = []
    for recompute in (False, True, True):
        x = given
        for blocks in stages:
            x = run_reversibly(list(blocks), x, owner=blocks, recompute=recompute)
        losses.clear()
        found.append(gradients(nn.ModuleList(stages), x))
    torch.testing.assert_close(found[1:], [found[0]] * 2)


def test_a_list_that_blocks_read_may_not_be_cleared_where_another_grows() -> None:
    told, losses = [[2.0, "name"]], [0.0]

    class Both(Told):
        def forward(self, x: Tensor) -> Tensor:
            self.losses.append(1.0)
            return super().forward(x)

    blocks = nn.ModuleList([Both(told)])
    blocks[0].losses = losses
    output = run_reversibly(list(blocks), torch.randn(3, 4), owner=blocks).sum()
    told.clear()
    with pytest.raises(RuntimeError, match=r"told\[0\]\[0\] of a Both"):
        output.backward()


def test_a_table_may_be_emptied_by_a_later_forward() -> None:
    class Table(Told):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) not in self.told:
                self.told.clear()
                self.told[len(x)] = torch.full((4,), float(len(x)))
            return self.told[len(x)] * torch.tanh(self.f(x))

    blocks = nn.ModuleList([Table({3: torch.full((4,), 3.0)})])
    given = [torch.randn(rows, 4) for rows in (3, 2)]
    wanted = gradients(blocks, *(run_reversibly(list(blocks), x, owner=blocks, recompute=False) for x in given))
    outputs = [run_reversibly(list(blocks), x, owner=blocks) for x in given]
    torch.testing.assert_close(gradients(blocks, *outputs), wanted)


def test_a_long_history_is_not_looked_through(monkeypatch) -> None:
    looked = []
    monkeypatch.setattr(_Value, "of", lambda value, of=_Value.of: looked.append(value) or of(value))
    blocks = nn.ModuleList([Recorder([torch.zeros(())] * 5000)])
    for _ in range(2):
        looked.clear()
        run_reversibly(list(blocks), torch.randn(3, 4), owner=blocks).sum().backward()
    assert 0 < len(looked) < 100


def test_what_the_last_step_left_is_not_kept_alive() -> None:
    class Watched(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            last = None if self.last is None else weakref.ref(self.last)
            y = super().forward(x)
            alive.append(last is not None and last() is not None)
            return y

    alive: list[bool] = []
    blocks = nn.ModuleList([Watched()])
    for _ in range(2):
        run_reversibly(list(blocks), torch.randn(3, 4), owner=blocks).sum().backward()
    assert alive == [False] * 4
