"""Recipes: which tensors have one, what they keep, and that they give the same bits."""

from __future__ import annotations

import weakref

import pytest
import torch
from reversible.networks import CHANNELS, chain
from torch import Tensor

from re2tal.reversible import run_reversibly
from re2tal.reversible.recompute import Recipe, cat_with_recipe, recomputable_from


def output(**options) -> Tensor:
    branches = chain("mlp", 4)
    x = torch.linspace(-1, 1, 3 * CHANNELS).view(3, CHANNELS)
    return run_reversibly(branches, x, owner=branches, **options)


@pytest.mark.parametrize("options", [{}, {"grid": 2**-10}, {"states": "int32"}, {"saved_outputs": 2}], ids=str)
def test_what_a_run_returns_is_recomputed_from_the_states_that_it_keeps(options) -> None:
    y = output(**options)
    recipe = Recipe.of(y)
    assert torch.equal(recipe.make(*recipe.tensors), y)
    kept = {state.untyped_storage()._cdata for state in y.grad_fn.saved_tensors}
    assert {state.untyped_storage()._cdata for state in recipe.tensors} == kept


@pytest.mark.parametrize("options", [{"merge": "extrapolate"}, {"saved_branches": 1}, {"recompute": False}])
def test_where_a_run_keeps_something_else_its_output_has_no_recipe(options) -> None:
    assert Recipe.of(output(**options)) is None


def test_where_states_are_kept_elsewhere_nothing_holds_them_here() -> None:
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, lambda tensor: tensor):
        y = output()
    assert Recipe.of(y) is None


def test_a_tensor_that_was_written_to_has_no_recipe_any_more() -> None:
    y = output()
    y.mul_(2)
    assert Recipe.of(y) is None


@pytest.mark.parametrize(
    "view", [lambda y: y.view_as(y), lambda y: y[1:, ::2], Tensor.t], ids=["alias", "part", "turned"]
)
def test_a_view_has_it_too(view) -> None:
    y = view(output())
    recipe = Recipe.of(y)
    again = recipe.make(*recipe.tensors)
    assert torch.equal(again, y)
    assert again.stride() == y.stride()


def test_a_tensor_that_autograd_follows_no_more_has_none() -> None:
    assert Recipe.of(output().detach()) is None
    assert Recipe.of(output().detach().requires_grad_()) is None


def doubled() -> tuple[Tensor, Tensor]:
    x = torch.arange(6.0)
    return x, recomputable_from(x * 2, [x], lambda x: x * 2)


def test_a_constant_may_have_one_as_long_as_it_wants_no_gradient() -> None:
    x, y = doubled()
    assert Recipe.of(y).tensors == (x,)
    assert Recipe.of(y.requires_grad_()) is None


def test_a_tensor_whose_source_was_written_to_or_is_gone_has_none() -> None:
    x, y = doubled()
    x.add_(1)
    assert Recipe.of(y) is None
    assert Recipe.of(doubled()[1]) is None


def test_where_nothing_is_kept_for_backward_nothing_has_a_recipe() -> None:
    x = torch.ones(2)
    with torch.no_grad():
        y = recomputable_from(x * 2, [x], lambda x: x * 2)
    assert Recipe.of(y) is None


def test_of_a_concatenation_the_parts_recipes_are_kept() -> None:
    y, other = output(), torch.ones(3, 2)
    both = cat_with_recipe([y, other, y], dim=1)
    recipe = Recipe.of(both)
    assert torch.equal(both, torch.cat([y, other, y], dim=1))
    assert torch.equal(recipe.make(*recipe.tensors), both)
    assert [torch.equal(tensor, other) for tensor in recipe.tensors if tensor.shape == other.shape] == [True]
    assert len(recipe.tensors) == 5


def test_a_part_of_a_concatenation_is_recomputed_from_the_whole() -> None:
    y, other = output(), torch.arange(6.0).view(3, 2)
    both = cat_with_recipe([other, y], dim=1)
    part = both[1:, 1:]
    recipe = Recipe.of(part)
    assert torch.equal(recipe.make(*recipe.tensors), part)


def test_a_concatenation_holds_no_part_that_nobody_asks_for() -> None:
    y, other = output(), torch.ones(3, 2)
    storage = weakref.ref(other.untyped_storage())
    both = cat_with_recipe([y, other], dim=1)
    del other
    assert storage() is None
    assert Recipe.of(both) is not None


def test_a_concatenation_of_parts_without_recipe_has_none_either() -> None:
    parts = [torch.ones(2, 2, requires_grad=True).exp() for _ in range(2)]
    assert Recipe.of(cat_with_recipe(parts, dim=0)) is None


def test_gradients_flow_through_a_concatenation() -> None:
    one, other = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    cat_with_recipe([one, other], dim=0).mul(torch.arange(8.0).view(4, 2)).sum().backward()
    assert torch.equal(one.grad, torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert torch.equal(other.grad, torch.tensor([[4.0, 5.0], [6.0, 7.0]]))
