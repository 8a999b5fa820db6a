"""Beta of a rewired network: set while it trains, read back, and what it makes runs keep."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from rewire.networks import Block, Caller, ScaledBlock, Walker, frames, seeded, walker

from re2tal.rewire import RewiringConfig, beta_of, count_states, rewire, same_wiring, set_beta, wiring_of


def test_beta_takes_effect_with_the_next_forward_and_leaves_copies_alone() -> None:
    net = walker(Block, Block, Block)
    plain = net(frames())
    rewire(net, config=RewiringConfig(beta=0.0))
    torch.testing.assert_close(net(frames()), plain)
    other = copy.deepcopy(net)
    set_beta(net, 0.25)
    assert (beta_of(net), beta_of(other)) == (0.25, 0.0)
    assert not torch.allclose(net(frames()), plain)
    assert torch.equal(other(frames()), copy.deepcopy(other)(frames()))
    paper = walker(Block, Block, Block)
    rewire(paper)
    set_beta(net, 1.0)
    assert torch.equal(net(frames()), paper(frames()))
    assert "beta=1.0" in repr(net.layers)


def test_states_are_counted_over_all_runs() -> None:
    net = seeded(Caller)  # two stages of two runs each, of two functions: nothing to forget
    rewire(net)
    assert count_states(net) == (8, 8)
    deep = walker(*[Block] * 8)
    rewire(deep, config=RewiringConfig(beta=0.5))
    # x[16], x[15], then three rebuilt, which multiplies errors by 8; and so on.
    assert count_states(deep) == (8, 16)
    set_beta(deep.bfloat16(), 0.5)
    assert count_states(deep) == (16, 16)
    set_beta(deep, 1.0)
    assert count_states(deep) == (2, 16)


def test_a_network_without_rewired_stages_has_no_beta() -> None:
    net = walker(Block)
    assert beta_of(net) is None
    assert count_states(net) == (0, 0)
    with pytest.raises(ValueError, match="this Walker has no beta: nothing in it is rewired"):
        set_beta(net, 0.5)


def test_stages_that_differ_are_refused_by_their_values() -> None:
    net = seeded(Caller)
    rewire(net)
    set_beta(net.stages[0], 0.5)
    with pytest.raises(ValueError, match=r"have beta \[0.5, 1.0\]; set it for all"):
        beta_of(net)


class OneTap(Walker):
    """Reads the state behind its second block, where it is told to."""

    def forward(self, x, tap):
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if tap and number == 1:
                x = x + x.mean(dim=1, keepdim=True)
        return x


def test_where_runs_end_belongs_to_the_wiring() -> None:
    wirings = []
    for tap in (True, False):
        net = seeded(lambda: OneTap(Block(), Block(), Block()))
        rewire(net, example=(frames(), tap))
        wirings.append(wiring_of(net))
    assert [wiring["ends"] for wiring in wirings] == [["layers.1"], []]
    tapped, whole = wirings
    recorded = json.loads(json.dumps(tapped))
    assert same_wiring(tapped, recorded)
    assert not same_wiring(whole, recorded)
    assert not same_wiring(None, recorded)
    del recorded["ends"]  # as files of earlier versions
    assert same_wiring(tapped, recorded)
    assert same_wiring(whole, recorded)
    assert not same_wiring(whole | {"beta": 0.5}, recorded)


@pytest.mark.parametrize("beta", [-0.5, 1.5, float("nan")])
def test_beta_outside_of_its_range_is_refused(beta) -> None:
    net = walker(ScaledBlock)
    rewire(net)
    for refused in (lambda: set_beta(net, beta), lambda: RewiringConfig(beta=beta)):
        with pytest.raises(ValueError, match=r"beta is .*; it lies in \[0, 1\]: 1 is the paper's coupling"):
            refused()
    assert beta_of(net) == 1.0
