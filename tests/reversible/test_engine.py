"""Values and gradients of a reversible run against the same branches under plain autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from reversible.networks import (
    CHANNELS,
    KINDS,
    Mlp,
    assert_close,
    assert_same_bits,
    chain,
    coupled,
    gradients,
    states,
)
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.utils import clip_grad_value_

from re2tal.reversible import run_reversibly

LENGTHS = (1, 2, 3, 5, 8)
MERGES = ("mean", "extrapolate")


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_match_the_sequence_that_keeps_its_activations(kind, length, merge, dtype, relative) -> None:
    branches, x = chain(kind, length).to(dtype), states(dtype=dtype)
    wanted = gradients(partial(coupled, branches, merge=merge), x, branches)
    for recompute in (True, False):
        run = partial(run_reversibly, branches, merge=merge, recompute=recompute, owner=branches)
        assert_close(gradients(run, x, branches), wanted, relative=relative)


@pytest.mark.parametrize("merge", MERGES)
def test_values_do_not_depend_on_recompute_to_the_last_bit(merge) -> None:
    branches, x = chain("transformer", 6), states()
    forgotten, kept, unwatched = (
        run_reversibly(branches, x, merge=merge, recompute=True),
        run_reversibly(branches, x, merge=merge, recompute=False),
        torch.no_grad()(run_reversibly)(branches, x, merge=merge),
    )
    assert torch.equal(forgotten, kept)
    assert torch.equal(forgotten, unwatched)
    assert forgotten.requires_grad
    assert not unwatched.requires_grad


def test_no_branches_give_the_input() -> None:
    x = states()
    assert run_reversibly([], x) is x


def test_extrapolating_two_whole_blocks_is_the_network_before_rewiring() -> None:
    blocks = [lambda x, f=f: x + f(x) for f in chain("mlp", 2).double()]
    x = states(dtype=torch.float64)
    rewired = run_reversibly([lambda x, block=block: block(x) - x for block in blocks], x, merge="extrapolate")
    torch.testing.assert_close(rewired, blocks[1](blocks[0](x)), rtol=1e-14, atol=1e-14)


def test_a_directional_difference_agrees_with_the_gradient() -> None:
    branches, x = chain("transformer", 5).double(), states(dtype=torch.float64)
    direction = states(1, dtype=torch.float64)
    run = partial(run_reversibly, branches)
    with torch.no_grad():
        ahead, behind = (run(x + sign * 1e-6 * direction).square().sum() for sign in (1, -1))
    x.requires_grad_()
    run(x).square().sum().backward()
    torch.testing.assert_close((x.grad * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-7, atol=0)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_input_is_never_written(length) -> None:
    branches, x = chain("mlp", length), states()
    before = x.clone()
    run_reversibly(branches, x).sum().backward()
    with torch.no_grad():
        run_reversibly(branches, x, merge="extrapolate")
    assert torch.equal(x, before)


def test_identity_views_and_constants_may_be_branches() -> None:
    constant = states(1, dtype=torch.float64)
    branches = [lambda x: x, lambda x: x.flatten(1).view_as(x), lambda x: constant, nn.Identity(), lambda x: x.detach()]
    module = nn.ModuleList()
    x = states(dtype=torch.float64)
    wanted = gradients(partial(coupled, branches), x, module)
    assert_close(gradients(partial(run_reversibly, branches), x, module), wanted, relative=1e-14)
    assert torch.equal(constant, states(1, dtype=torch.float64))


def test_gradients_of_several_steps_accumulate() -> None:
    branches = chain("transformer", 4).double()
    for seed in (0, 1):
        run_reversibly(branches, states(seed, dtype=torch.float64)).square().sum().backward()
    found = [parameter.grad.clone() for parameter in branches.parameters()]
    branches.zero_grad()
    sum(coupled(branches, states(seed, dtype=torch.float64)).square().sum() for seed in (0, 1)).backward()
    for got, parameter in zip(found, branches.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-11, atol=1e-13)


def test_a_frozen_stem_still_trains_the_branches() -> None:
    branches, x = chain("transformer", 4).double(), states(dtype=torch.float64)
    for owner in (branches, None):
        branches.zero_grad()
        run_reversibly(branches, x, owner=owner).square().sum().backward()
        found = [parameter.grad.clone() for parameter in branches.parameters()]
        branches.zero_grad()
        coupled(branches, x).square().sum().backward()
        for got, parameter in zip(found, branches.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("frozen", [(0,), (1, 3), (3,), (0, 1, 2, 3)])
def test_frozen_branches_get_nothing_and_the_others_what_they_should(frozen) -> None:
    branches, x = chain("mlp", 4).double(), states(dtype=torch.float64)
    for index in frozen:
        branches[index].requires_grad_(False)
    wanted = gradients(partial(coupled, branches), x, branches)
    found = gradients(partial(run_reversibly, branches, owner=branches), x, branches)
    assert not {f"{index}.up.weight" for index in frozen} & found.keys()
    assert_close(found, wanted, relative=1e-12)


def test_nothing_is_kept_where_nothing_wants_a_gradient() -> None:
    branches = chain("mlp", 3).requires_grad_(False)
    assert not run_reversibly(branches, states(), owner=branches).requires_grad


def test_module_hooks_see_inputs_that_want_no_gradient_in_forward() -> None:
    branches, seen = chain("mlp", 2), []
    branches[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    output = run_reversibly(branches, states().requires_grad_())
    assert seen == [False]
    output.sum().backward()
    assert seen == [False, True]


def test_gradient_hooks_fire_once_per_backward() -> None:
    branches, x = chain("transformer", 5), states().requires_grad_()
    fired: dict[str, int] = {}
    for name, parameter in branches.named_parameters():
        parameter.register_hook(lambda gradient, name=name: fired.update({name: fired.get(name, 0) + 1}))
        parameter.register_post_accumulate_grad_hook(lambda p, n=f"{name} +": fired.update({n: fired.get(n, 0) + 1}))
    for step in (1, 2):
        run_reversibly(branches, x).sum().backward()
        assert set(fired.values()) == {step}
    assert len(fired) == 2 * len(list(branches.parameters()))


HOOKS = {
    "register_hook": lambda gradient: gradient.clamp(-1, 1),
    "register_post_accumulate_grad_hook": lambda one: None,
    "register_post_accumulate_grad_hook of torch": partial(clip_grad_value_, clip_value=0.1),
}


def hook(kind: str, parameter: nn.Parameter) -> None:
    if kind == "an optimizer of torch":
        _apply_optimizer_in_backward(torch.optim.SGD, [parameter], {"lr": 0.1})
    else:
        getattr(parameter, kind.split()[0])(HOOKS[kind])


@pytest.mark.parametrize("kind", [*HOOKS, "an optimizer of torch"])
def test_a_hook_on_a_parameter_that_two_branches_share_is_an_error(kind) -> None:
    """In plain autograd it fires once, with the sum of both parts."""
    branches, x = chain("mlp", 3), states()
    run_reversibly([branches[0], branches[1], branches[0]], x, owner=branches).sum().backward()
    hook(kind, branches[0].up.weight)
    run_reversibly(branches, x, owner=branches).sum().backward()
    output = run_reversibly([branches[0], branches[1], branches[0]], x, owner=branches)
    with pytest.raises(RuntimeError, match="a parameter with a hook is shared by two branches"):
        output.sum().backward()


def test_two_forwards_before_one_backward() -> None:
    branches = chain("transformer", 4, dropout=0.3).double()
    x = states(dtype=torch.float64)
    both = lambda run: lambda x: run(x) + 2 * run(x * 0.5)  # noqa: E731
    wanted = gradients(both(partial(coupled, branches)), x, branches)
    assert_close(gradients(both(partial(run_reversibly, branches)), x, branches), wanted, relative=1e-12)


def test_runs_follow_each_other() -> None:
    first, second = chain("mlp", 3).double(), chain("mlp", 2, seed=1).double()
    module, x = nn.ModuleList([*first, *second]), states(dtype=torch.float64)
    wanted = gradients(lambda x: coupled(second, coupled(first, x)), x, module)
    assert_close(
        gradients(lambda x: run_reversibly(second, run_reversibly(first, x)), x, module), wanted, relative=1e-12
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_batch_norm_statistics_are_written_once(dropout) -> None:
    branches, reference = (chain("conv", 4, dropout=dropout) for _ in range(2))
    run, plain = partial(run_reversibly, branches, owner=branches), partial(coupled, reference)
    for _ in range(2):
        gradients(lambda x: run(x) + run(x * 0.5), states(), branches)
        gradients(lambda x: plain(x) + plain(x * 0.5), states(), reference)
    for (name, buffer), wanted in zip(branches.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, wanted), name
    assert branches[0].norm1.num_batches_tracked == 4


def test_batch_norm_in_evaluation_mode_is_left_alone() -> None:
    branches, x = chain("conv", 3).double().eval(), states(dtype=torch.float64)
    before = [buffer.clone() for buffer in branches.buffers()]
    wanted = gradients(partial(coupled, branches), x, branches)
    assert_close(gradients(partial(run_reversibly, branches, owner=branches), x, branches), wanted, relative=1e-12)
    assert all(torch.equal(buffer, was) for buffer, was in zip(branches.buffers(), before, strict=True))


def test_an_output_edited_in_place_gives_the_gradients_of_the_edited_output() -> None:
    branches, x = chain("mlp", 3).double(), states(dtype=torch.float64)
    wanted = gradients(lambda x: coupled(branches, x).mul_(3), x, branches)
    assert_close(gradients(lambda x: run_reversibly(branches, x).mul_(3), x, branches), wanted, relative=1e-12)


def test_an_input_edited_before_a_backward_that_needs_it_is_noticed() -> None:
    branches, x = chain("mlp", 1), states()
    output = run_reversibly(branches, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_states_may_be_moved_away_between_forward_and_backward() -> None:
    branches, x = chain("mlp", 4).double(), states(dtype=torch.float64)

    def offloaded(x):
        with torch.autograd.graph.save_on_cpu():
            return run_reversibly(branches, x)

    assert_same_bits(gradients(offloaded, x, branches), gradients(partial(run_reversibly, branches), x, branches))


def test_checkpointing_around_a_run_gives_the_same_gradients() -> None:
    branches, x = chain("mlp", 3, dropout=0.2).double(), states(dtype=torch.float64)
    run = partial(run_reversibly, branches)
    around = lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)  # noqa: E731
    assert_same_bits(gradients(around, x, branches), gradients(run, x, branches))


@pytest.mark.parametrize("x", [torch.ones(2, 0, CHANNELS), torch.ones(0, 3, CHANNELS)])
def test_empty_batches_pass(x) -> None:
    branches = chain("mlp", 3)
    output = run_reversibly(branches, x.requires_grad_())
    output.sum().backward()
    assert output.shape == x.shape
    assert all(not parameter.grad.any() for parameter in branches.parameters())


def test_any_memory_format_and_any_number_of_axes() -> None:
    branches = nn.ModuleList(nn.Conv3d(CHANNELS, CHANNELS, 1) for _ in range(3)).double()
    x = torch.randn(2, CHANNELS, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last_3d)
    wanted = gradients(partial(coupled, branches), x, branches)
    assert_close(gradients(partial(run_reversibly, branches), x, branches), wanted, relative=1e-12)


def test_a_branch_may_be_used_twice_in_a_run() -> None:
    mlp = Mlp().double()
    x = states(dtype=torch.float64)
    wanted = gradients(partial(coupled, [mlp, mlp, mlp]), x, mlp)
    assert_close(gradients(partial(run_reversibly, [mlp, mlp, mlp]), x, mlp), wanted, relative=1e-12)


class Averaging(nn.Module):
    """BatchNorm, and beside it a buffer that is read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("average", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.norm(x) * self.average.clone()
        self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return output


def test_statistics_beside_a_buffer_that_is_read_are_written_once_in_the_first_step_too() -> None:
    buffers = []
    for recompute in (True, False):
        torch.manual_seed(0)
        branches = nn.ModuleList(Averaging() for _ in range(3))
        x = torch.randn(8, 4)
        for _ in range(2):
            run_reversibly(branches, x, recompute=recompute, owner=branches).square().sum().backward()
        buffers.append(dict(branches.named_buffers()))
    assert buffers[0]["0.norm.num_batches_tracked"] == 2
    torch.testing.assert_close(*buffers)
