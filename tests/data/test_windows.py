import math
from itertools import pairwise

import numpy as np
import pytest
from data.folders import indexed

from re2tal.data.streaming.windows import ResizeWhole, Slide, Trimmed, draw_window, plan_windows
from re2tal.structures import Action


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def test_short_windows_come_with_the_long_ones_and_are_padded_to_the_same_length():
    windowing = Slide(20, frames_per_second=30, overlap=0.5, short_share=0.5, short_length=0.4)
    windows = plan_windows(indexed(40), windowing)
    starts = [(window.window_id, int(window.indices[0]), window.num_valid) for window in windows]
    long = [(0, 0, 20), (1, 10, 20), (2, 20, 20)]
    assert starts == [*long, *((3 + n, 4 * n, 8) for n in range(9))]
    assert {len(window.indices) for window in windows} == {20}
    # A video that a short window shows wholly is shown once.
    assert len(plan_windows(indexed(8), windowing)) == 1


def test_half_of_the_windows_drawn_for_training_are_short():
    actions = [Action(1.0, 1.1, "jump")]
    windowing = Slide(60, frames_per_second=30, short_share=0.5, short_length=0.4)
    drawn = [draw_window(indexed(120, actions=actions), windowing, generator=rng(seed)) for seed in range(400)]
    counts = [window.num_valid for window in drawn]
    assert set(counts) == {24, 60}
    assert 160 <= counts.count(24) <= 240
    assert all(window.actions for window in drawn)


def test_resizing_takes_the_centres_of_equal_stretches():
    # 12 frames in 4 stretches of 3: the middle ones; 30 frames a second, so a clip frame lasts 0.1 s.
    (window,) = plan_windows(indexed(12), ResizeWhole(4))
    assert window.indices.tolist() == [1, 4, 7, 10]
    assert window.mask.all()
    assert [window.timeline.to_seconds(t) for t in range(5)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_resizing_repeats_frames_of_a_short_video():
    (window,) = plan_windows(indexed(2), ResizeWhole(6))
    assert window.indices.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("num_frames", [8189, 16375, 16378, 16381, 1, 767, 768, 769])
def test_resizing_gives_the_same_number_of_frames_for_every_video_length(num_frames):
    # The first four lengths make a range with a fractional step one frame too long at 768.
    (window,) = plan_windows(indexed(num_frames), ResizeWhole(768))
    assert len(window.indices) == 768
    assert np.all(np.diff(window.indices) >= 0)
    assert window.indices[-1] <= num_frames - 1


def test_resizing_leaves_very_short_actions_out_of_training_only():
    actions = (Action(0.0, 0.04, "x"), Action(1.0, 1.2, "x"))
    video = indexed(300, actions=actions)  # 10 s; 1 % of it is 0.1 s
    assert draw_window(video, ResizeWhole(16), generator=rng(0)).actions == actions[1:]
    assert plan_windows(video, ResizeWhole(16))[0].actions == actions


def test_sliding_windows_overlap_and_the_last_one_ends_with_the_video():
    # 30 frames a second at 15: every second frame, 50 samples. Windows of 20 with overlap 0.5 start at 0, 10, 20, 30.
    windows = plan_windows(indexed(100), Slide(20, frames_per_second=15, overlap=0.5))
    assert [w.indices[0] for w in windows] == [0, 20, 40, 60]
    assert [w.indices[-1] for w in windows] == [38, 58, 78, 98]
    assert [w.window_id for w in windows] == [0, 1, 2, 3]
    assert [w.timeline.start_seconds for w in windows] == pytest.approx([0.0, 10 / 15, 20 / 15, 30 / 15])
    assert windows[0].timeline.seconds_per_step == pytest.approx(1 / 15)


def test_the_last_window_is_flush_when_the_step_does_not_divide_the_video():
    windows = plan_windows(indexed(45), Slide(20, frames_per_second=30, overlap=0.25))
    assert [w.indices[0] for w in windows] == [0, 15, 25]
    assert all(w.mask.all() for w in windows)


def test_a_short_video_is_one_padded_window():
    (window,) = plan_windows(indexed(5), Slide(8, frames_per_second=30))
    assert window.indices.tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert window.mask.tolist() == [True] * 5 + [False] * 3


def test_a_rate_that_does_not_divide_the_stored_one_takes_the_nearest_frames():
    # 30 to 8 frames a second: 3.75 frames apart.
    (window,) = plan_windows(indexed(30), Slide(8, frames_per_second=8))
    assert window.indices.tolist() == [0, 4, 8, 11, 15, 19, 22, 26]
    assert window.timeline.to_seconds(4) * 30 == pytest.approx(15)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("num_frames", [1, 63, 64, 65, 200, 333])
def test_windows_cover_every_frame_of_a_video(num_frames, overlap):
    windowing = Slide(64, frames_per_second=30, overlap=overlap)
    windows = plan_windows(indexed(num_frames), windowing)
    assert set(np.concatenate([w.indices[w.mask] for w in windows]).tolist()) == set(range(num_frames))
    assert all(a.indices[0] < b.indices[0] for a, b in pairwise(windows))


def test_a_frame_of_the_clip_lies_on_the_timeline_where_the_stored_frame_is_shown():
    for window in plan_windows(indexed(500, fps=25.0), Slide(32, frames_per_second=12.5)):
        times = [window.timeline.to_seconds(t) for t in range(32)]
        assert times == pytest.approx((window.indices / 25.0).tolist())


def test_actions_are_cut_to_the_window_and_kept_if_enough_of_them_is_inside():
    actions = (
        Action(0.0, 1.0, "before"),  # none of it in the second window
        Action(1.8, 2.2, "half"),  # half of it
        Action(1.8, 2.8, "most"),  # 0.8 of it
        Action(2.5, 3.0, "all"),
    )
    _, window = plan_windows(indexed(120, actions=actions), Slide(60, frames_per_second=30, overlap=0.0))
    assert (window.timeline.start_seconds, window.timeline.to_seconds(60)) == pytest.approx((2.0, 4.0))
    assert window.actions == (Action(2.0, 2.8, "most"), Action(2.5, 3.0, "all"))


def test_a_drawn_window_shows_an_action():
    video = indexed(3000, actions=(Action(71.0, 73.0, "x"),))  # 100 s
    windowing = Slide(150, frames_per_second=30)
    windows = [draw_window(video, windowing, generator=rng(seed)) for seed in range(50)]
    assert all(window.actions for window in windows)
    assert len({int(window.indices[0]) for window in windows}) > 30
    for window in windows:
        (action,) = window.actions
        assert action.end_seconds - action.start_seconds >= 0.75 * 2.0 - 1e-9
        start = window.timeline.start_seconds
        assert start - 1e-9 <= action.start_seconds < action.end_seconds <= start + 5.0 + 1e-9


@pytest.mark.parametrize("actions", [(), (Action(0.0, 100.0, "longer than any window can show"),)])
def test_a_video_whose_actions_do_not_fit_gives_a_window_without_any(actions):
    window = draw_window(indexed(3000, actions=actions), Slide(150, frames_per_second=30), generator=rng(0))
    assert window.actions == ()
    assert len(window.indices) == 150


def test_a_drawn_window_of_a_short_video_is_a_random_large_part_of_it():
    windowing = Slide(128, frames_per_second=30, shortest_crop=0.9)
    windows = [draw_window(indexed(100), windowing, generator=rng(seed)) for seed in range(200)]
    counts = [window.num_valid for window in windows]
    assert min(counts) == 90
    assert max(counts) == 100
    assert all(window.indices[0] + window.num_valid <= 100 for window in windows)
    assert len({int(window.indices[0]) for window in windows}) > 5


def test_the_generator_decides_the_window():
    video, windowing = indexed(3000), Slide(150, frames_per_second=30)
    same = [draw_window(video, windowing, generator=rng(0, 4)).indices[0] for _ in range(2)]
    other = draw_window(video, windowing, generator=rng(0, 5)).indices[0]
    assert same[0] == same[1] != other


def test_a_rate_above_the_stored_one_is_refused():
    with pytest.raises(
        ValueError,
        match=r"data\.clips\.windowing\.frames_per_second is 31, but v is stored at 30 .* lower it, or build",
    ):
        plan_windows(indexed(100), Slide(20, frames_per_second=31))
    assert len(plan_windows(indexed(100, fps=29.97), Slide(200, frames_per_second=30000 / 1001))) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResizeWhole(0), r"data\.clips\.windowing\.num_frames is 0"),
        (lambda: Slide(overlap=1.0), r"data\.clips\.windowing\.overlap is 1\.0; give a share"),
        (lambda: Slide(frames_per_second=math.nan), "frames_per_second is nan"),
        (lambda: Slide(kept_share=1.5), r"data\.clips\.windowing\.kept_share is 1\.5"),
        (lambda: Slide(shortest_crop=0.0), "shortest_crop is 0.0"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_views_of_a_trimmed_video_reach_from_its_start_to_its_end():
    # 30 frames a second at 15: 50 samples of every second frame. Four views of 20 start at 0, 10, 20 and 30.
    video = indexed(100, actions=(Action(0.0, 100 / 30, "x"),))
    windowing = Trimmed(20, frames_per_second=15, num_views=4)
    windows = plan_windows(video, windowing)
    assert [w.indices[0] for w in windows] == [0, 20, 40, 60]
    assert [w.indices[-1] for w in windows] == [38, 58, 78, 98]
    assert [w.timeline.start_seconds for w in windows] == pytest.approx([0.0, 10 / 15, 20 / 15, 30 / 15])
    assert all(w.mask.all() and w.actions == video.record.actions and w.crop == 0.5 for w in windows)
    (middle,) = plan_windows(video, Trimmed(20, frames_per_second=15, num_views=1))
    assert middle.indices[0] == 30


def test_three_crops_of_every_view_are_windows_of_their_own():
    windowing = Trimmed(20, frames_per_second=15, num_views=2, num_crops=3)
    windows = plan_windows(indexed(100), windowing)
    assert len(windows) == 6
    assert [(w.window_id, w.indices[0], w.crop) for w in windows] == [
        (0, 0, 0.0),
        (1, 0, 0.5),
        (2, 0, 1.0),
        (3, 60, 0.0),
        (4, 60, 0.5),
        (5, 60, 1.0),
    ]


def test_a_trimmed_video_shorter_than_a_clip_starts_again_and_has_one_view():
    windowing = Trimmed(8, frames_per_second=30, num_views=4)
    (window,) = plan_windows(indexed(3), windowing)
    assert window.indices.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert window.mask.all()
    assert draw_window(indexed(3), windowing, generator=rng(0)).indices.tolist() == window.indices.tolist()


def test_training_draws_every_stretch_of_a_trimmed_video():
    windowing, video = Trimmed(20, frames_per_second=15), indexed(100, actions=(Action(0.0, 100 / 30, "x"),))
    windows = [draw_window(video, windowing, generator=rng(seed)) for seed in range(400)]
    assert {int(w.indices[0]) for w in windows} == set(range(0, 61, 2))
    assert all(np.all(np.diff(w.indices) == 2) and w.actions == video.record.actions for w in windows)


def test_a_stride_counts_frames_of_each_video_whatever_their_rate() -> None:
    for fps in (25.0, 30.0):
        windows = plan_windows(indexed(101, fps=fps), Slide(20, frames_per_second=None, frame_stride=2, overlap=0.5))
        # 51 frames are taken; the last window ends with the last of them.
        assert [window.indices.tolist() for window in windows] == [
            list(range(2 * start, 2 * (start + 20), 2)) for start in (0, 10, 20, 30, 31)
        ]
        assert windows[1].timeline.to_seconds(3.0) == pytest.approx((20 + 3 * 2) / fps)
    with pytest.raises(ValueError, match=r"frame_stride is 2, but frames_per_second is 15, .* set that to null"):
        Slide(frame_stride=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_views": 0}, "num_views is 0; give 1 or more"),
        ({"num_crops": 2}, "num_crops is 2; give 1 or 3"),
        ({"frames_per_second": 0.0}, "frames_per_second is 0.0; give a positive number"),
    ],
)
def test_trimmed_refuses_what_makes_no_clip(options, message):
    with pytest.raises(ValueError, match=message):
        Trimmed(**options)
