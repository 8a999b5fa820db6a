import math

import pytest
import torch

from re2tal.structures import ClipBatch, Timeline


def test_timeline_reproduces_a_hand_worked_thumos_window():
    # 30 fps, window starts at frame 600, every second frame taken: frame step 7 is source frame 614.
    frames = Timeline(start_seconds=600 / 30, seconds_per_step=2 / 30, duration_seconds=100.0)
    assert frames.to_seconds(7.0) == pytest.approx(614 / 30)
    # One grid cell is two sampled frames, four source frames.
    cells = frames.coarsen(2)
    assert cells.to_seconds(10.0) == pytest.approx((600 + 40) / 30)
    assert cells.to_steps(640 / 30) == pytest.approx(10.0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_seconds_are_clamped_to_the_video(as_tensor):
    timeline = Timeline(start_seconds=5.0, seconds_per_step=1.0, duration_seconds=8.0)
    convert = (lambda value: torch.tensor(value)) if as_tensor else float
    assert float(timeline.to_seconds(convert(-9.0))) == 0.0
    assert float(timeline.to_seconds(convert(9.0))) == 8.0
    assert float(timeline.to_steps(convert(99.0))) == 3.0


def test_steps_and_seconds_are_inverse_inside_the_video():
    timeline = Timeline(start_seconds=1.25, seconds_per_step=0.4, duration_seconds=60.0)
    steps = torch.linspace(0.0, 100.0, 33, dtype=torch.float64)
    torch.testing.assert_close(timeline.to_steps(timeline.to_seconds(steps)), steps)


@pytest.mark.parametrize(
    ("start", "step", "duration", "text"),
    [
        (math.nan, 1.0, 1.0, r"Timeline.start_seconds is nan; give a finite number"),
        (0.0, math.inf, 1.0, r"Timeline.seconds_per_step is inf"),
        (0.0, 0.0, 1.0, r"needs positive seconds_per_step"),
        (0.0, 1.0, -3.0, r"needs positive seconds_per_step and duration_seconds"),
    ],
)
def test_a_timeline_that_cannot_convert_is_refused(start, step, duration, text):
    with pytest.raises(ValueError, match=text):
        Timeline(start, step, duration)


def test_moving_a_batch_moves_its_tensors_and_keeps_the_rest():
    batch = ClipBatch(
        frames=torch.zeros(1, 3, 4, 2, 2, dtype=torch.uint8),
        frame_mask=torch.ones(1, 4, dtype=torch.bool),
        actions=((),),
        timelines=(Timeline(0.0, 1.0, 4.0),),
        video_ids=("a",),
        window_ids=(0,),
        valid=torch.ones(1, dtype=torch.bool),
    )
    moved = batch.to("meta")
    assert moved.frames.device.type == moved.frame_mask.device.type == moved.valid.device.type == "meta"
    assert (moved.video_ids, moved.timelines) == (batch.video_ids, batch.timelines)
