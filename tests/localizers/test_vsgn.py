"""VSGN's graph, boundaries and configuration; test_contract.py holds what every localizer promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from re2tal.localizers.vsgn.config import VSGNConfig
from re2tal.localizers.vsgn.localizer import VSGN
from re2tal.localizers.vsgn.network import BoundaryHead, GraphConv, nearest
from re2tal.localizers.weights import export_weights, import_weights
from re2tal.structures import Features

TINY = VSGNConfig(channels=16, num_groups=4, num_levels=3, first_stride=2, num_neighbours=4, num_head_convs=1)


def build(config: VSGNConfig = TINY) -> VSGN:
    torch.manual_seed(0)
    return VSGN(config, in_channels=6, classes=("dive", "jump"))


def test_neighbours_are_the_steps_with_the_closest_features_itself_first() -> None:
    steps = torch.tensor([[[0.0], [5.0], [1.0], [7.0]]])
    assert nearest(steps, 2)[0].tolist() == [[0, 2], [1, 3], [2, 0], [3, 1]]
    assert nearest(steps, 9).shape == (1, 4, 4)


def test_the_graph_takes_the_largest_response_over_pairs_of_neighbour_and_centre() -> None:
    graph = GraphConv(3, num_neighbours=2)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ours, chosen = graph(x), nearest(x.transpose(1, 2), 2)
    for clip in range(2):
        for step in range(5):
            pairs = [torch.cat([x[clip, :, other], x[clip, :, step]]) for other in chosen[clip, step].tolist()]
            reference = torch.stack([graph.linear(pair) for pair in pairs]).amax(dim=0)
            torch.testing.assert_close(ours[clip, :, step], reference)


def test_boundaries_see_the_features_at_them_and_an_eighth_of_the_length_around() -> None:
    head = BoundaryHead(1, stride=2)
    finest = torch.arange(16.0)[None, None]
    # Length 16 steps: 2 before, at, and 2 after step 8, on a grid of stride 2; the end likewise around 23.
    segments = torch.tensor([[[8.0, 23.0]]])
    seen: list[torch.Tensor] = []
    head.start.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    head.end.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    shifts = head(finest, segments, num_steps=32)
    assert [x.flatten().tolist() for x in seen] == [[3, 4, 5], [10, 11, 12]]
    assert shifts.shape == (1, 1, 2)


@pytest.mark.parametrize("num_neighbours", [None, 4])
@pytest.mark.parametrize("num_steps", [1, 15, 16, 40])
def test_any_length_gives_all_anchors_of_the_padded_clip(num_neighbours: int | None, num_steps: int) -> None:
    localizer = build(replace(TINY, num_neighbours=num_neighbours)).eval()
    outputs = localizer(Features(torch.randn(1, 6, num_steps), torch.ones(1, num_steps, dtype=torch.bool)))
    padded = -(-num_steps // 8) * 8
    assert outputs.evaluation.shape == (1, 3, padded)
    assert outputs.adjusted.shape == (1, 2 * (padded // 2 + padded // 4 + padded // 8), 2)
    assert outputs.logits.shape[-1] == 3


def test_weights_survive_the_way_to_opentads_names_and_back() -> None:
    first, second = build(), VSGN(TINY, in_channels=6, classes=("dive", "jump"))
    second.load_state_dict(import_weights(export_weights(first, layout="opentad"), localizer=second, layout="opentad"))
    for (name, ours), theirs in zip(second.state_dict().items(), first.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_layout_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown layout 'mmaction' for vsgn; known: \['opentad', 'original'\]"):
        export_weights(build(), layout="mmaction")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 18}, "channels=18 must be a multiple of num_groups=4"),
        ({"first_stride": 3}, "first_stride=3 must be even"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_the_reason(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
