import itertools

import numpy as np
import pytest

from re2tal.data.streaming import epoch_order
from re2tal.data.streaming.clip_config import ClipConfig
from re2tal.data.streaming.epoch_order import Unit, batch_units, count_steps, evaluation_order, training_order

WORLDS = (1, 2, 3, 4, 5, 8)
BATCHES = (1, 2, 3)


def ranks(order, *, steps, batch_size, world_size, start=0):
    """What each rank reads, step by step."""
    return [
        [batch_units(order, s, batch_size=batch_size, rank=r, world_size=world_size) for s in range(start, steps)]
        for r in range(world_size)
    ]


def shards(*counts: int) -> list[str]:
    return [f"shard-{number:06d}.tar" for number, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_training_reads_no_video_twice_and_leaves_out_less_than_a_step(world_size, batch_size):
    names = shards(10, 3, 17, 9)
    steps = count_steps(len(names), batch_size=batch_size, world_size=world_size, training=True)
    order = training_order(names, shuffle_span=6, seed=0, epoch=3)
    read = ranks(order, steps=steps, batch_size=batch_size, world_size=world_size)
    units = [unit for rank in read for batch in rank for unit in batch]
    assert all(unit.valid for unit in units)
    assert len({unit.video for unit in units}) == len(units) == steps * world_size * batch_size
    assert len(names) - len(units) < world_size * batch_size


@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_evaluation_reads_every_window_once_and_fills_up_with_invalid_ones(world_size, batch_size):
    order = evaluation_order([3, 1, 4, 1, 5])
    steps = count_steps(len(order), batch_size=batch_size, world_size=world_size, training=False)
    units = [
        u for rank in ranks(order, steps=steps, batch_size=batch_size, world_size=world_size) for b in rank for u in b
    ]
    assert len(units) == steps * world_size * batch_size
    valid = sorted((unit.video, unit.window) for unit in units if unit.valid)
    assert valid == [(video, window) for video, count in enumerate([3, 1, 4, 1, 5]) for window in range(count)]


def test_evaluation_of_less_than_one_unit_per_rank_still_gives_every_rank_a_step():
    order = evaluation_order([1, 2])
    assert count_steps(3, batch_size=2, world_size=8, training=False) == 1
    read = ranks(order, steps=1, batch_size=2, world_size=8)
    assert [sum(unit.valid for unit in rank[0]) for rank in read] == [2, 1, 0, 0, 0, 0, 0, 0]
    assert all(len(rank[0]) == 2 for rank in read)


def test_a_step_holds_the_same_units_however_many_ranks_share_it():
    order = training_order(shards(20, 20, 20), shuffle_span=60, seed=1, epoch=0)
    splits = [
        [
            [unit for rank in ranks(order, steps=5, batch_size=12 // world, world_size=world) for unit in rank[step]]
            for step in range(5)
        ]
        for world in (1, 2, 3, 4, 6, 12)
    ]
    assert all(split == splits[0] for split in splits)


def by_the_book(names, *, shuffle_span, seed, epoch):
    """One video at a time: what the arrays must give, number by number."""
    generator = np.random.default_rng([seed, epoch])
    places = {}
    for video, shard in enumerate(names):
        places.setdefault(shard, []).append(video)
    videos = [v for number in generator.permutation(len(places)) for v in places[list(places)[number]]]
    buffer, order = videos[:shuffle_span], []
    for video in videos[shuffle_span:]:
        place = int(generator.integers(len(buffer)))
        order.append(buffer[place])
        buffer[place] = video
    return order + [buffer[place] for place in generator.permutation(len(buffer))]


@pytest.mark.parametrize("span", [1, 2, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("names", [["b"], ["b", "a", "b", "c", "a"] * 30, shards(*range(1, 40))])
def test_an_order_is_the_one_that_drawing_one_by_one_gives(names, span, monkeypatch):
    for at_once in (3, 50, 1 << 16):
        monkeypatch.setattr(epoch_order, "_DRAWN_AT_ONCE", at_once)
        for seed, epoch in ((0, 0), (5, 9)):
            units = training_order(names, shuffle_span=span, seed=seed, epoch=epoch)
            wanted = by_the_book(names, shuffle_span=span, seed=seed, epoch=epoch)
            assert list(units) == [Unit(video, 0) for video in wanted]


def test_entering_at_a_step_gives_what_would_have_come():
    order = training_order(shards(9, 9), shuffle_span=4, seed=0, epoch=2)
    whole = ranks(order, steps=4, batch_size=2, world_size=2)
    rest = ranks(order, steps=4, batch_size=2, world_size=2, start=3)
    assert [rank[3:] for rank in whole] == rest


def test_epochs_and_seeds_have_their_own_order_and_repeat_it():
    names = shards(30, 30)
    orders = {
        (seed, epoch): tuple(training_order(names, shuffle_span=16, seed=seed, epoch=epoch))
        for seed, epoch in itertools.product(range(3), range(3))
    }
    assert len(set(orders.values())) == 9
    assert orders[1, 2] == tuple(training_order(names, shuffle_span=16, seed=1, epoch=2))


def test_every_video_comes_up_even_if_each_epoch_leaves_some_out():
    names, seen = shards(7), set()
    for epoch in range(20):
        order = training_order(names, shuffle_span=7, seed=0, epoch=epoch)
        seen |= {unit.video for unit in batch_units(order, 0, batch_size=4, rank=0, world_size=1)}
    assert seen == set(range(7))


def test_shuffling_within_a_span_keeps_reading_near_one_place():
    names = shards(*[50] * 6)
    order = [unit.video for unit in training_order(names, shuffle_span=1, seed=0, epoch=0)]
    blocks = [order[first : first + 50] for first in range(0, 300, 50)]
    assert sorted(block[0] for block in blocks) == [0, 50, 100, 150, 200, 250]
    assert all(block == list(range(block[0], block[0] + 50)) for block in blocks)
    shuffled = [unit.video for unit in training_order(names, shuffle_span=10, seed=0, epoch=0)]
    assert sorted(shuffled) == list(range(300))
    place = {video: number for number, video in enumerate(order)}
    # A video leaves the buffer at the earliest when it enters it: at most 10 places early.
    assert max(place[video] - number for number, video in enumerate(shuffled)) <= 10


def test_by_default_a_batch_shows_videos_of_one_shard_as_often_as_chance_does():
    """20,000 videos, 64 a shard, batches of 64."""
    names = np.arange(20_000) // 64
    order = training_order(names, shuffle_span=ClipConfig().shuffle_span, seed=0, epoch=0).videos
    beside = []
    for first in range(0, 19_968, 64):
        batch = names[order[first : first + 64]].tolist()
        beside += [batch.count(shard) > 1 for shard in batch]
    chance = 1 - (1 - 64 / 20_000) ** 63
    assert abs(np.mean(beside) - chance) < 0.02


@pytest.mark.parametrize(("world_size", "batch_size"), [(8, 1), (2, 4), (1, 8)])
def test_more_clips_in_a_step_than_videos_is_refused(world_size, batch_size):
    with pytest.raises(ValueError, match=rf"7 videos are too few .* {world_size} ranks x batch_size {batch_size} = 8"):
        count_steps(7, batch_size=batch_size, world_size=world_size, training=True)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_split_is_refused(training):
    with pytest.raises(ValueError, match="the split is empty"):
        count_steps(0, batch_size=1, world_size=1, training=training)


def test_numbers_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="batch_size is 0 and world_size 2"):
        count_steps(7, batch_size=0, world_size=2, training=True)
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        batch_units([Unit(0, 0)], 0, batch_size=1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="shuffle_span is 0"):
        training_order(["a"], shuffle_span=0, seed=0, epoch=0)
