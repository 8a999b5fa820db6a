"""What modules in a run hold besides parameters: put back for backward, or an error; counters are told."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
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


def assert_plain(blocks: nn.ModuleList, change: Callable[[], Callable[[], None]]) -> None:
    """A change after forward leaves gradients as where activations are kept."""
    x, found = torch.randn(3, 4), []
    for recompute in (False, True):
        output = run_reversibly(list(blocks), x, owner=blocks, recompute=recompute)
        undo = change()
        found.append(gradients(blocks, output))
        undo()
    torch.testing.assert_close(*found)


def exchanged(store: Any, key: Any, value: Any) -> Callable[[], Callable[[], None]]:
    """Sets an entry, and returns what sets it back."""

    def change() -> Callable[[], None]:
        was, store[key] = store[key], value

        def undo() -> None:
            assert store[key] is value, "backward leaves what it found"
            store[key] = was

        return undo

    return change


@pytest.mark.parametrize("name", VALUES)
def test_backward_finds_what_forward_found(name) -> None:
    blocks = nn.ModuleList([Scaled(), Scaled()])
    assert_plain(blocks, exchanged(vars(blocks[1]), name, VALUES[name]))


def test_one_that_is_gone_is_there_in_backward_and_gone_behind_it() -> None:
    blocks, output = output_of()
    del blocks[1].scale
    output.backward()
    assert not hasattr(blocks[1], "scale")


def test_what_a_type_has_counts_until_a_module_has_its_own() -> None:
    class OfType(Scaled):
        factor = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * super().forward(x)

    blocks, x, found = nn.ModuleList([OfType(), OfType()]), torch.randn(3, 4), []
    for recompute in (False, True):
        output = run_reversibly(list(blocks), x, owner=blocks, recompute=recompute)
        blocks[0].factor, OfType.factor = 5.0, 7.0
        found.append(gradients(blocks, output))
        assert (blocks[0].factor, blocks[1].factor) == (5.0, 7.0)
        assert "factor" not in vars(blocks[1])
        del blocks[0].factor
        OfType.factor = 2.0
    torch.testing.assert_close(*found)


def test_what_a_hook_sets_in_backward_stays() -> None:
    blocks, output = output_of()
    blocks[0].scale = blocks[1].scale = 0.5
    blocks[0].f.weight.register_hook(lambda gradient: setattr(blocks[0], "scale", 0.25))
    output.backward()
    assert (blocks[0].scale, blocks[1].scale) == (0.25, 0.5)


def test_an_error_in_backward_leaves_what_was_set() -> None:
    blocks, output = output_of()
    blocks[0].scale = 0.5
    blocks[1].f.weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.backward()
    assert blocks[0].scale == 0.5


def test_two_forwards_with_other_numbers_each_have_theirs_in_backward() -> None:
    blocks = nn.ModuleList([Scaled(), Scaled()])
    x, found = torch.randn(3, 4), []
    for recompute in (False, True):
        outputs = []
        for scale in (1.0, 0.5):
            blocks[0].scale = scale
            outputs.append(run_reversibly(list(blocks), x, owner=blocks, recompute=recompute))
        found.append(gradients(blocks, *outputs))
    torch.testing.assert_close(*found)


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


@pytest.mark.parametrize("kind", [dict, SimpleNamespace, list], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("step", [2.0, torch.ones(4)], ids=["number", "tensor"])
def test_backward_finds_what_lists_dicts_and_objects_held(kind, step) -> None:
    told = [[step, "name"]] if kind is list else kind(step=step, name="name")
    blocks = nn.ModuleList([Told(told), Told(told)])
    store, key = (told[0], 0) if kind is list else (told if kind is dict else vars(told), "step")
    assert_plain(blocks, exchanged(store, key, 3.0))


def test_a_tensor_in_a_dict_that_was_written_before_it_was_exchanged_is_an_error() -> None:
    told = {"step": torch.ones(4)}
    blocks = nn.ModuleList([Told(told)])
    output = run_reversibly(list(blocks), torch.randn(3, 4), owner=blocks).sum()
    told["step"].add_(1)
    told["step"] = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"told\['step'\] of a Told, .* \(it was a tensor, and is another"):
        output.backward()


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
    monkeypatch.setattr(_Value, "of", lambda *given, of=_Value.of: looked.append(given) or of(*given))
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
