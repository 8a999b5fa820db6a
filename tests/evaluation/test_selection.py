"""What is left out before suppression, and what of a stream is final, against suppression of everything at once."""

from __future__ import annotations

import pytest
import torch

from re2tal.evaluation.selection import Selection, Settling, labels_of, pick
from re2tal.evaluation.suppression import SuppressionConfig, suppress
from re2tal.structures import Detections

METHODS = [
    SuppressionConfig(method="gaussian", sigma=0.5),
    SuppressionConfig(method="hard", iou_threshold=0.4),
    SuppressionConfig(method="linear", iou_threshold=0.3, per_class=False),
    SuppressionConfig(method="none", min_score=0.0),
]


def drawn(number: int, *, seconds: float, seed: int = 0) -> Detections:
    """Random detections of three classes, up to 3 s long."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(number, generator=generator) * (seconds - 3)
    lengths = torch.rand(number, generator=generator) * 2.5 + 0.5
    scores = torch.rand(number, generator=generator)
    labels = torch.randint(3, (number,), generator=generator)
    return Detections(torch.stack([starts, starts + lengths], 1), scores, labels)


def rows(detections: Detections, *, start: float = 0.0) -> list[tuple]:
    """Sorted by start, rounded to what float32 holds."""
    found = zip(
        (detections.segments.double() - start).tolist(),
        detections.scores.tolist(),
        detections.labels.tolist(),
        strict=True,
    )
    return sorted((round(a, 3), round(b, 3), label, round(score, 4)) for (a, b), score, label in found)


@pytest.mark.parametrize("suppression", METHODS, ids=lambda one: one.method)
def test_what_scores_less_than_wanted_may_go_before_suppression(suppression: SuppressionConfig) -> None:
    everything = drawn(400, seconds=60)
    selection = Selection(min_score=0.5, top=17, labels=frozenset([0, 2]))
    few = selection.before(everything, suppression)
    assert len(few) < 250
    early = selection.after(suppress(few, suppression))
    late = selection.after(suppress(everything, suppression))
    assert rows(early) == rows(late)
    assert 0 < len(late) <= 17


def test_votes_are_counted_of_all() -> None:
    config = SuppressionConfig(method="hard", iou_threshold=0.4, per_class=False, voting_threshold=0.5)
    assert len(Selection(min_score=0.5).before(drawn(50, seconds=20), config)) == 50


@pytest.mark.parametrize("suppression", METHODS, ids=lambda one: one.method)
@pytest.mark.parametrize("start", [0.0, 3e6])
def test_a_stream_settles_into_what_suppression_gives_of_all(suppression: SuppressionConfig, start: float) -> None:
    """Windows of 8 s, every 4 s, a month into the stream or at its start; each gives what lies inside it."""
    everything = drawn(150, seconds=200)
    selection = Selection(min_score=0.3)
    settling = Settling(suppression, selection, reach_seconds=8.0)
    found, last = [], start
    for begin in range(0, 200, 4):
        inside = (everything.segments[:, 0] >= begin) & (everything.segments[:, 0] < begin + 4)
        window = pick(everything, inside)
        window = Detections(window.segments.double() + start, window.scores, window.labels)
        now = settling.add(window, window_seconds=start + begin)
        assert not len(now) or (now.segments[:, 1] <= start + begin - 8).all()
        found += rows(now, start=start)
        last = len(found)
    assert last > 20  # most were final before the end
    found += rows(settling.end(duration_seconds=start + 300), start=start)
    assert sorted(found) == rows(selection.after(suppress(everything, suppression)))


def test_what_reaches_back_over_final_times_is_cut_there_and_a_chain_without_end_ends() -> None:
    config, selection = SuppressionConfig(method="none"), Selection()
    settling = Settling(config, selection, reach_seconds=1.0)
    label = torch.tensor([0])
    assert not len(settling.add(Detections(torch.tensor([[0.0, 50.0]]), label + 0.9, label), window_seconds=0.0))
    assert not len(settling.add(Detections(torch.tensor([[2.0, 3.0]]), label + 0.8, label), window_seconds=11.0))
    assert len(settling.add(Detections(torch.tensor([[5.0, 21.0]]), label + 0.7, label), window_seconds=20.0)) == 3
    assert not len(settling.add(Detections(torch.tensor([[5.0, 21.0]]), label + 0.7, label), window_seconds=20.5))
    (segment,) = settling.end(duration_seconds=20.75).segments.tolist()
    assert segment == [19.0, 20.75]


def test_wrong_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_score is 1\.5; give a number from 0 to 1"):
        Selection(min_score=1.5)
    with pytest.raises(ValueError, match="top is 0; give 1 or more"):
        Selection(top=0)
    with pytest.raises(ValueError, match=r"'jum', which the model does not know; did you mean 'jump'\? It knows jump"):
        labels_of(["jump", "run"], ["run", "jum"])
    assert labels_of(["jump", "run"], ["run"]) == {1}
    assert labels_of(["jump", "run"], []) is None
