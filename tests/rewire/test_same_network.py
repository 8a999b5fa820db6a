"""Networks whose parents do more than hand a state on: rewired exactly, or refused with the place and the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from rewire.networks import CHANNELS, Block, Walker, frames, seeded
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from re2tal.rewire import Branch, RewireError, RewiringConfig, residual_branches, rewire, unrewire
from re2tal.rewire.stage import RewiredStage

Run = Callable[..., Tensor]
"""(blocks, state, mask of each) -> the end of one reversible run over them."""


def coupled_run(blocks: list[Block], x: Tensor, masks: list[Tensor] | None = None) -> Tensor:
    """The paper's coupling over the branches of `blocks`, in plain autograd."""
    previous = current = x
    for block, mask in zip(blocks, masks or [None] * len(blocks), strict=True):
        for branch in (block.mix, block.transform):
            previous, current = current, previous + branch(current, mask)
    return (previous + current) / 2


def plain_run(blocks: list[Block], x: Tensor, masks: list[Tensor] | None = None) -> Tensor:
    for block, mask in zip(blocks, masks or [None] * len(blocks), strict=True):
        x = block(x, mask)
    return x


def masks_for(x: Tensor, number: int) -> list[Tensor]:
    return [(torch.arange(x.shape[1]) < 3 + 4 * n).to(x.dtype).expand(x.shape[:2]) for n in range(number)]


class Masked(Walker):
    """Every block gets another mask."""

    def forward(self, x):
        x = self.stem(x)
        for layer, mask in zip(self.layers, masks_for(x, len(self.layers)), strict=True):
            x = layer(x, mask=mask)
        return x

    def reference(self, x, run: Run):
        x = self.stem(x)
        return run(list(self.layers), x, masks_for(x, len(self.layers)))


class Tapped(Walker):
    """Returns the states between blocks, in a dict."""

    def forward(self, x):
        x, states = self.stem(x), ()
        for layer in self.layers:
            states += (x,)
            x = layer(x)
        return {"last": x, "states": states}

    def reference(self, x, run: Run):
        x, states = self.stem(x), ()
        for layer in self.layers:
            states += (x,)
            x = run([layer], x)
        return {"last": x, "states": states}


class OneTap(Walker):
    """Reads the state behind its second block."""

    def forward(self, x):
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 1:
                deep = x.mean(dim=1)
        return x, deep

    def reference(self, x, run: Run):
        blocks = list(self.layers)
        middle = run(blocks[:2], self.stem(x))
        return run(blocks[2:], middle), middle.mean(dim=1)


class LongSkip(Walker):
    """A U-Net: what the first half of the blocks returned is added before those of the second half."""

    def forward(self, x):
        x, kept, half = self.stem(x), [], len(self.layers) // 2
        for layer in self.layers[:half]:
            x = layer(x)
            kept.append(x)
        for layer in self.layers[half:]:
            x = layer(x + kept.pop())
        return x

    def reference(self, x, run: Run):
        x, kept, half = self.stem(x), [], len(self.layers) // 2
        for layer in list(self.layers)[:half]:
            x = run([layer], x)
            kept.append(x)
        for layer in list(self.layers)[half:]:
            x = run([layer], x + kept.pop())
        return x


class Forked(Walker):
    """One state goes into two blocks."""

    def forward(self, x):
        x = self.layers[0](self.stem(x))
        return self.layers[1](x) + self.layers[2](x)

    def reference(self, x, run: Run):
        first, second, third = self.layers
        x = run([first], self.stem(x))
        return run([second], x) + run([third], x)


class Repeated(Walker):
    """Weights shared over depth, as ALBERT's: three times through the list."""

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            for layer in self.layers:
                x = layer(x)
        return x

    def reference(self, x, run: Run):
        x = self.stem(x)
        for _ in range(3):
            x = run(list(self.layers), x)
        return x


class Late(Walker):
    """Attributes of blocks are read, and blocks are called in another order than they have."""

    def forward(self, x):
        x = self.stem(x).to(self.layers[0].norm1.weight.dtype)
        for number in (1, 0, 2):
            x = self.layers[number](x)
        return x

    def reference(self, x, run: Run):
        first, second, third = self.layers
        return run([second, first, third], self.stem(x))


class Summed(Walker):
    def forward(self, x):
        return super().forward(x)

    def reference(self, x, run: Run):
        return run([self.layers[0], self.layers[1], self.layers[0]], self.stem(x))


def summed() -> Summed:
    first, second = Block(), Block()
    return Summed(first, second, first)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "another mask for each block": (lambda: Masked(*(Block() for _ in range(4))), ()),
    "states between blocks": (lambda: Tapped(*(Block() for _ in range(3))), ("layers.0", "layers.1")),
    "the state behind one block": (lambda: OneTap(*(Block() for _ in range(4))), ("layers.1",)),
    "skips across blocks": (lambda: LongSkip(*(Block() for _ in range(4))), ("layers.0", "layers.1", "layers.2")),
    "a state for two blocks": (lambda: Forked(*(Block() for _ in range(3))), ("layers.0", "layers.1")),
    "one block twice in the list": (summed, ()),
    "the list three times": (lambda: Repeated(Block(), Block()), ()),
    "blocks by index": (lambda: Late(*(Block() for _ in range(3))), ()),
}
NEEDS_EXAMPLE = {name for name, (_, ends) in NETWORKS.items() if ends}


def gradients(net: nn.Module, forward: Callable[[Tensor], object]) -> list[Tensor]:
    net.zero_grad()
    outputs = tree_leaves(forward(frames()))
    sum(((number + 1) * one.square().sum() for number, one in enumerate(outputs)), torch.zeros(())).backward()
    return [*(one.detach() for one in outputs), *(one.grad for one in net.parameters() if one.grad is not None)]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_are_those_of_the_network_written_out(name, beta, recompute) -> None:
    build, _ = NETWORKS[name]
    net = seeded(build)
    reference = copy.deepcopy(net)
    wanted = gradients(reference, lambda x: reference.reference(x, coupled_run if beta else plain_run))
    rewire(net, config=RewiringConfig(beta=beta, recompute=recompute), example=(frames(tokens=12),))
    found = gradients(net, net)
    assert len(found) == len(wanted)
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_runs_end_where_the_example_uses_states_and_the_report_says_so(name) -> None:
    build, wanted = NETWORKS[name]
    report = rewire(seeded(build), example=(frames(),))
    assert [end for end in report.ends if end not in wanted] in ([], ["layers.2"])
    assert set(wanted) <= set(report.ends)
    assert ("states are used in between" in str(report)) == bool(wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_an_example_they_are_exact_or_an_error_in_the_first_forward(name) -> None:
    net = seeded(NETWORKS[name][0])
    reference = copy.deepcopy(net)
    rewire(net)
    if name in NEEDS_EXAMPLE:
        message = r"the state behind block layers\.\d is used by something else than the next block .* with an example"
        with pytest.raises(RewireError, match=message):
            gradients(net, net)
        return
    wanted = gradients(reference, lambda x: reference.reference(x, coupled_run))
    for have, want in zip(gradients(net, net), wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------ refusals


class Backdoor(Walker):
    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers.children():
            x = layer(x)
        return x


class Lying(Block):
    """Registered with half of what it adds."""

    def forward(self, x, mask=None):
        return super().forward(x, mask) + 0.1 * torch.tanh(x)


@residual_branches.register
def _(block: Lying) -> tuple[Branch, ...]:
    return Branch("mix", Block.mix), Branch("mlp", Block.transform)


class Counting(Block):
    """What it adds depends on how often it was called in training."""

    calls = 0

    def mix(self, x, mask=None):
        self.calls += self.training
        return super().mix(x, mask) * (self.calls if self.training else 1)


@residual_branches.register
def _(block: Counting) -> tuple[Branch, ...]:
    return Branch("mix", Counting.mix), Branch("mlp", Block.transform)


class Typed(Walker):
    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            if not isinstance(layer, nn.Module):
                raise TypeError("no module")
            x = layer(x)
        return x


class Inner(Walker):
    """Returns something from inside a block, which a run gives no gradient."""

    def forward(self, x):
        seen = []
        handle = self.layers.get_submodule("1").mixer.register_forward_hook(lambda *args: seen.append(args[-1]))
        x = super().forward(x)
        handle.remove()
        return x, seen[0]


class Learnable(Walker):
    """Hands its blocks a mask that is learned."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.mask = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return super().forward(x, self.mask.expand(len(x), 16))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "blocks through children()": (
        lambda: Backdoor(Block(), Block()),
        r"block layers\.0 was called past its rewired stage",
    ),
    "branches that do not add up": (
        lambda: Walker(Block(), Lying(), Block()),
        r"rewired at beta 0, this Walker is another network: output differs by .* it starts in block layers\.1: the "
        "branches registered for Lying do not add up to what the block returns",
    ),
    "another output when it runs again": (
        lambda: Walker(Block(), Counting()),
        r"block layers\.1 \(Counting\) gives another output when it runs again with the same input, draws and buffers",
    ),
    "a parent that asks for modules": (
        lambda: Typed(Block(), Block()),
        "this Typed runs on the example, but not rewired, .*: no module",
    ),
    "an output from inside a branch": (
        lambda: Inner(Block(), Block()),
        r"output\[1\] of this Inner has a gradient, and would have none rewired: it comes from inside of a branch",
    ),
    "a further argument that wants a gradient": (
        lambda: Learnable(Block(), Block()),
        "not rewired, .* a further argument that wants a gradient",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_network_is_refused_and_the_model_stays_plain(name) -> None:
    build, message = REFUSED[name]
    net = seeded(build)
    wanted = tree_leaves(net.eval()(frames()))
    with pytest.raises(RewireError, match=message):
        rewire(net, example=(frames(),))
    assert not any(isinstance(module, RewiredStage) for module in net.modules())
    assert all(torch.equal(one, other) for one, other in zip(tree_leaves(net(frames())), wanted, strict=True))


def test_blocks_that_are_called_past_their_stage_are_an_error_without_an_example() -> None:
    net = seeded(lambda: Backdoor(Block(), Block()))
    wanted = net(frames())
    rewire(net)
    with pytest.raises(RewireError, match=r"block layers\.0 was called past its rewired stage"):
        net(frames())
    unrewire(net)
    assert torch.equal(net(frames()), wanted)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_an_example_that_fails_or_gives_no_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the example does not run through this Walker: RuntimeError: mat1 and mat2"):
        rewire(seeded(lambda: Walker(Block())), example=(torch.ones(2, 3, 5),))
    net = seeded(lambda: Walker(Block()))
    nn.init.constant_(net.layers[0].mixer.weight, torch.nan)
    with pytest.raises(ValueError, match="before anything is rewired, output of this Walker is NaN on the example"):
        rewire(net, example=(frames(),))
    assert type(net.layers) is nn.ModuleList


def test_an_example_may_be_a_tensor_and_is_then_one_argument_whatever_its_batch() -> None:
    shapes: list[torch.Size] = []
    net = seeded(lambda: Walker(Block()))
    net.register_forward_pre_hook(lambda module, arguments: shapes.extend(each.shape for each in arguments))
    rewire(net, example=frames()[:1])
    assert set(shapes) == {frames()[:1].shape}


def test_an_example_changes_nothing_of_the_model() -> None:
    net = seeded(lambda: Walker(Block(), BatchNormed(), Block())).float().train()
    net.layers[0].eval()
    modes = [module.training for module in net.modules()]
    before = {name: (value, value.data_ptr(), value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    draws, x = torch.get_rng_state(), frames().float()
    rewire(net, example={"x": x})
    assert torch.equal(torch.get_rng_state(), draws)
    assert [module.training for module in net.modules()] == modes
    for name, value in net.state_dict(keep_vars=True).items():
        same, place, values = before[name]
        assert value is same
        assert value.data_ptr() == place
        assert torch.equal(value, values)
        assert value.dtype == values.dtype
    assert net(x).dtype == torch.float32


class BatchNormed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm1d(16)


@residual_branches.register
def _(block: BatchNormed) -> tuple[Branch, ...]:
    return Branch("mix", Block.mix), Branch("mlp", Block.transform)


class Caching(Walker):
    """Keeps tables of the dtype that came first."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.table = None
        self.register_buffer("later", None)

    def forward(self, x):
        if self.table is None:
            self.table = self.later = torch.ones(x.shape[:2], dtype=x.dtype)
            self.register_buffer("made", self.table + 1)
        return super().forward(x, self.table + self.later + self.made)


def test_tables_that_the_comparison_made_in_float64_do_not_stay() -> None:
    net = seeded(lambda: Caching(Block(), Block())).float()
    rewire(net, example=(frames().float(),))
    assert net.table is None
    assert net.later is None
    assert not hasattr(net, "made")
    assert net(frames().float()).dtype == torch.float32


class OnlyFloat32(Walker):
    def forward(self, x):
        assert self.stem.weight.dtype == torch.float32
        return super().forward(x)


def test_a_model_that_runs_in_its_own_dtype_only_is_compared_there() -> None:
    x = frames().float()
    rewire(seeded(lambda: OnlyFloat32(Block(), Block())).float(), example=(x,))
    with pytest.raises(RewireError, match="output differs"):
        rewire(seeded(lambda: OnlyFloat32(Block(), Lying())).float(), example=(x,))


class Drawing(Block):
    """Draws from a generator of its own, which no replay sets back."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def mix(self, x, mask=None):
        return super().mix(x, mask) * torch.rand(1, generator=self.generator).to(x.dtype)


@residual_branches.register
def _(block: Drawing) -> tuple[Branch, ...]:
    return Branch("mix", Drawing.mix), Branch("mlp", Block.transform)


@pytest.mark.parametrize("kind", [Drawing, Counting])
def test_a_branch_that_does_not_repeat_is_an_error_in_the_first_backward_without_an_example(kind) -> None:
    net = seeded(lambda: Walker(kind(), kind(), Block()))
    rewire(net)
    loss = net(frames()).square().sum()
    with pytest.raises(RuntimeError, match=r"rewired stage layers: .* gives something else when it runs again"):
        loss.backward()


class Centred(Walker):
    """Returns a mean that a norm has made zero: all that is left of it is rounding."""

    def forward(self, x):
        x = super().forward(x)
        return nn.functional.layer_norm(x, x.shape[-1:]).mean(dim=-1)


@pytest.mark.parametrize("seed", range(3))
def test_outputs_that_are_nothing_but_rounding_are_no_difference(seed) -> None:
    """Whole blocks add and subtract x, so that roundings differ."""
    net = seeded(lambda: Centred(Block(), Block(), Block()), seed=seed)
    assert float(net(frames()).abs().max()) < 1e-14
    rewire(net, config=RewiringConfig(unit="block"), example=(frames(),))


class Whisper(Walker):
    """Returns something as small, of which every digit counts."""

    def forward(self, x):
        return super().forward(x) * 1e-17


def test_small_outputs_that_are_no_rounding_are_compared() -> None:
    rewire(seeded(lambda: Whisper(Block(), Block())), config=RewiringConfig(unit="block"), example=(frames(),))
    with pytest.raises(RewireError, match="output differs"):
        rewire(seeded(lambda: Whisper(Block(), Lying())), example=(frames(),))


# --------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("given", [True, False])
def test_hooks_on_blocks_see_the_state_where_a_run_ends(given) -> None:
    net, seen = seeded(lambda: Walker(Block(), Block(), Block())), []
    reference = copy.deepcopy(net)
    net.layers[1].register_forward_hook(lambda block, args, output: seen.append(output.detach() + 0))
    rewire(net, example=(frames(),) if given else None)
    if not given:
        with pytest.raises(RewireError, match=r"behind block layers\.1 is used by something else .* a hook"):
            net(frames())
        return
    seen.clear()
    output = net(frames())
    middle = coupled_run(list(reference.layers)[:2], reference.stem(frames()))
    torch.testing.assert_close(seen, [middle.detach()], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output, coupled_run([reference.layers[2]], middle), rtol=1e-10, atol=1e-10)


def test_a_hook_may_change_what_a_block_is_given() -> None:
    net = seeded(lambda: Walker(Block(), Block()))
    reference, mask = copy.deepcopy(net), masks_for(torch.ones(2, 16, dtype=torch.float64), 1)[0]
    net.layers[1].register_forward_pre_hook(
        lambda block, args, kwargs: (args, {**kwargs, "mask": mask}), with_kwargs=True
    )
    rewire(net, example=(frames(),))
    wanted = coupled_run(list(reference.layers), reference.stem(frames()), [None, mask])
    torch.testing.assert_close(net(frames()), wanted, rtol=1e-10, atol=1e-10)


def test_backward_hooks_on_blocks_are_refused() -> None:
    net = seeded(lambda: Walker(Block(), Block()))
    net.layers[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(
        RewireError, match=r"block layers\.0 has a backward hook, but is differentiated branch by branch"
    ):
        rewire(net, example=(frames(),))
    rewire(net)
    with pytest.raises(RewireError, match=r"block layers\.0 has a backward hook"):
        net(frames())


# ------------------------------------------------------------------------------------- what changes between two blocks


class Rewriting(Walker):
    """One mask, written to between the blocks."""

    def forward(self, x):
        x, mask = self.stem(x), torch.ones(x.shape[:2], dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, mask=mask)
            mask.mul_(0.5)
        return x


def test_an_argument_that_is_written_before_its_run_ends_is_an_error() -> None:
    net = seeded(lambda: Rewriting(Block(), Block()))
    rewire(net)
    with pytest.raises(
        RewireError, match=r"an argument of block layers\.0 was written to after .*: before its run ended"
    ):
        net(frames())


class FrozenStart(Walker):
    def forward(self, x):
        with torch.no_grad():
            x = self.layers[0](self.stem(x))
        return self.layers[1](x)


def test_a_run_ends_where_gradients_are_switched_on() -> None:
    net = seeded(lambda: FrozenStart(Block(), Block()))
    rewire(net)
    with pytest.raises(RewireError, match=r"behind block layers\.0 is used by something else"):
        net(frames())
    net = seeded(lambda: FrozenStart(Block(), Block()))
    assert rewire(net, example=(frames(),)).ends == ("layers.0",)
    net(frames()).sum().backward()
    assert net.layers.get_submodule("0").mixer.weight.grad is None
    assert net.layers.get_submodule("1").mixer.weight.grad is not None


def test_a_pending_state_tells_its_shape() -> None:
    shapes = []

    class Asking(Walker):
        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x)
                shapes.append((x.shape, x.size(1), x.ndim, len(x), x.dtype, x.device.type, x.requires_grad, x.numel()))
            return x

    rewire(net := seeded(lambda: Asking(Block(), Block())))
    net(frames())
    assert shapes[0] == shapes[1] == ((2, 16, CHANNELS), 16, 3, 2, torch.float64, "cpu", True, 256)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_model_without_numbers_is_refused_with_what_to_do(device: str) -> None:
    model = Walker(Block(), Block()).to("meta")
    with pytest.raises(ValueError, match=r"this Walker, or its example, lies on the meta device, which has none; put"):
        rewire(model, example=frames().to(device))
    assert rewire(model).stages[0].rewired_blocks
